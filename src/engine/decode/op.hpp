#pragma once
#include "base/types.hpp"

/// What an instruction is, independent of its encoding. One name per operation; widths and operand
/// kinds are in the DecodedInsn. Conditional forms carry their condition in the low four bits of
/// the last opcode byte. Everything whose semantics are "what the host's own vector or x87 unit
/// does with these registers and this memory operand" is one of the *Host* operations.
namespace ring3::engine {

enum class Op : u16 {
  Invalid,  ///< undefined in this mode: #UD
  // integer arithmetic and logic (families/alu)
  Add, Or, Adc, Sbb, And, Sub, Xor, Cmp, Test, Inc, Dec, Neg, Not, Xadd, Cmpxchg, Cmpxchg8b, Cmpxchg16b,
  Adcx, Adox, Andn, Bextr, Blsi, Blsmsk, Blsr, Bzhi, Mulx, Pdep, Pext, Rorx, Sarx, Shlx, Shrx,
  Mul, Imul1, Imul2, Imul3, Div, Idiv, Aaa, Aad, Aam, Aas, Daa, Das,
  // shifts and bits
  Rol, Ror, Rcl, Rcr, Shl, Shr, Sar, Shld, Shrd, Bt, Bts, Btr, Btc, Bsf, Bsr, Tzcnt, Lzcnt, Popcnt, Crc32, Bswap,
  // data movement
  Mov, Movbe, Movnti, Movzx, Movsx, Movsxd, Lea, Xchg, Cmovcc, Setcc, Cbw /* CBW/CWDE/CDQE by opsize */,
  Cwd /* CWD/CDQ/CQO */, Lahf, Sahf, Xlat, Nop, Pause, Prefetch, Endbr, Salc,
  // stack
  Push, Pop, Pusha, Popa, Pushf, Popf, Enter, Leave,
  // control flow
  Jmp, Jcc, Jcxz /* by addrsize */, Loop, Loope, Loopne, Call, Ret, CallFar, JmpFar, RetFar, Iret,
  Int3, Int, Into, Int1, Ud, Bound,
  // strings
  Movs, Cmps, Scas, Lods, Stos, Ins, Outs,
  // flags
  Clc, Stc, Cmc, Cld, Std, Cli, Sti, Clac, Stac,
  // I/O
  In, Out,
  // segmentation and system
  MovSeg /* to or from a segment register */, PushSeg, PopSeg, Lds, Les, Lfs, Lgs, Lss,
  Lgdt, Lidt, Lldt, Ltr, Sgdt, Sidt, Sldt, Str, Lmsw, Smsw, Lar, Lsl, Verr, Verw, Arpl, Clts,
  MovCr, MovDr, Rdmsr, Wrmsr, Rdtsc, Rdtscp, Rdpmc, Rdpid, Cpuid, Hlt, Invd, Wbinvd, Invlpg, Invpcid,
  Syscall, Sysret, Sysenter, Sysexit, Swapgs, Rdfsbase, Rdgsbase, Wrfsbase, Wrgsbase, Xgetbv, Xsetbv,
  Monitor, Mwait, Vmcall, Vmmcall, Rsm, Rdrand, Rdseed, Lfence, Mfence, Sfence, Clflush, Clflushopt, Clwb,
  Clzero, Serialize, Rdpkru, Wrpkru,
  // FPU and vector state
  Fxsave, Fxrstor, Xsave, Xsaveopt, Xsavec, Xsaves, Xrstor, Xrstors, Ldmxcsr, Stmxcsr, Emms, Fwait,
  Vzeroupper, Vzeroall,
  // run on the host's own units, operands substituted
  HostX87,      ///< any x87 instruction (D8..DF), FSAVE/FRSTOR/FLDENV/FSTENV included
  HostMmx,      ///< touches an MM register (also CVTPI2PS and friends)
  HostVec,      ///< SSE*/AVX*/AES/SHA/… with at most one contiguous memory operand; kEvex, kOpmask: AVX-512's
  Maskmov,      ///< MASKMOVQ, (V)MASKMOVDQU: implicit [rDI], byte mask
  Vmaskmov,     ///< VMASKMOVPS/PD, VPMASKMOVD/Q: element mask suppresses faults
  Vgather,      ///< VGATHER*, VPGATHER*
  Vscatter,     ///< VSCATTER*, VPSCATTER*
  Count
};

/// The CPUID feature an instruction needs. Base: always there in x86-64.
enum class Feature : u8 {
  Base, X87, Mmx, Sse, Sse2, Sse3, Ssse3, Sse41, Sse42, Sse4a, Avx, Avx2, F16c, Fma, Aes, Pclmul, Vaes, Vpclmul, Gfni, Sha,
  Bmi1, Bmi2, Adx, Lzcnt, Popcnt, Movbe, Cx8, Cx16, Fxsr, Xsave, Xsaveopt, Xsavec, Xsaves, Rdtscp, Rdpid, Rdrand, Rdseed,
  Fsgsbase, Smap, Invpcid, Clflush, Clflushopt, Clwb, Clzero, Monitor, Syscall, Sysenter, LahfLm, Prefetchw, Cmov, Tsc, Msr,
  Pku, Serialize,
  Avx512f, Avx512dq, Avx512ifma, Avx512cd, Avx512bw, Avx512vl, Avx512vbmi, Avx512vbmi2, Avx512vnni, Avx512bitalg, Avx512vpopcntdq,
  Avx512vp2intersect, Avx512fp16, Avx512bf16,
  Unsupported,
  Count
};

const char* name(Op op);

}  // namespace ring3::engine
