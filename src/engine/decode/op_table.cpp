#include "engine/decode/op_table.hpp"

#include <array>

namespace ring3::engine {
namespace {

struct Pair {
  ZydisMnemonic mnemonic;
  OpRow row;
};

// clang-format off
constexpr Pair kPairs[] = {
    {ZYDIS_MNEMONIC_ADD, {Op::Add}},
    {ZYDIS_MNEMONIC_OR, {Op::Or}},
    {ZYDIS_MNEMONIC_ADC, {Op::Adc}},
    {ZYDIS_MNEMONIC_SBB, {Op::Sbb}},
    {ZYDIS_MNEMONIC_AND, {Op::And}},
    {ZYDIS_MNEMONIC_SUB, {Op::Sub}},
    {ZYDIS_MNEMONIC_XOR, {Op::Xor}},
    {ZYDIS_MNEMONIC_CMP, {Op::Cmp}},
    {ZYDIS_MNEMONIC_TEST, {Op::Test}},
    {ZYDIS_MNEMONIC_INC, {Op::Inc}},
    {ZYDIS_MNEMONIC_DEC, {Op::Dec}},
    {ZYDIS_MNEMONIC_NEG, {Op::Neg}},
    {ZYDIS_MNEMONIC_NOT, {Op::Not}},
    {ZYDIS_MNEMONIC_XADD, {Op::Xadd}},
    {ZYDIS_MNEMONIC_CMPXCHG, {Op::Cmpxchg}},
    {ZYDIS_MNEMONIC_CMPXCHG8B, {Op::Cmpxchg8b}},
    {ZYDIS_MNEMONIC_CMPXCHG16B, {Op::Cmpxchg16b}},
    {ZYDIS_MNEMONIC_ADCX, {Op::Adcx}},
    {ZYDIS_MNEMONIC_ADOX, {Op::Adox}},
    {ZYDIS_MNEMONIC_ANDN, {Op::Andn}},
    {ZYDIS_MNEMONIC_BEXTR, {Op::Bextr}},
    {ZYDIS_MNEMONIC_BLSI, {Op::Blsi}},
    {ZYDIS_MNEMONIC_BLSMSK, {Op::Blsmsk}},
    {ZYDIS_MNEMONIC_BLSR, {Op::Blsr}},
    {ZYDIS_MNEMONIC_BZHI, {Op::Bzhi}},
    {ZYDIS_MNEMONIC_MULX, {Op::Mulx}},
    {ZYDIS_MNEMONIC_PDEP, {Op::Pdep}},
    {ZYDIS_MNEMONIC_PEXT, {Op::Pext}},
    {ZYDIS_MNEMONIC_RORX, {Op::Rorx}},
    {ZYDIS_MNEMONIC_SARX, {Op::Sarx}},
    {ZYDIS_MNEMONIC_SHLX, {Op::Shlx}},
    {ZYDIS_MNEMONIC_SHRX, {Op::Shrx}},
    {ZYDIS_MNEMONIC_MUL, {Op::Mul}},
    {ZYDIS_MNEMONIC_DIV, {Op::Div}},
    {ZYDIS_MNEMONIC_IDIV, {Op::Idiv}},
    {ZYDIS_MNEMONIC_AAA, {Op::Aaa}},
    {ZYDIS_MNEMONIC_AAD, {Op::Aad}},
    {ZYDIS_MNEMONIC_AAM, {Op::Aam}},
    {ZYDIS_MNEMONIC_AAS, {Op::Aas}},
    {ZYDIS_MNEMONIC_DAA, {Op::Daa}},
    {ZYDIS_MNEMONIC_DAS, {Op::Das}},
    {ZYDIS_MNEMONIC_ROL, {Op::Rol}},
    {ZYDIS_MNEMONIC_ROR, {Op::Ror}},
    {ZYDIS_MNEMONIC_RCL, {Op::Rcl}},
    {ZYDIS_MNEMONIC_RCR, {Op::Rcr}},
    {ZYDIS_MNEMONIC_SHL, {Op::Shl}},
    {ZYDIS_MNEMONIC_SHR, {Op::Shr}},
    {ZYDIS_MNEMONIC_SAR, {Op::Sar}},
    {ZYDIS_MNEMONIC_SHLD, {Op::Shld}},
    {ZYDIS_MNEMONIC_SHRD, {Op::Shrd}},
    {ZYDIS_MNEMONIC_BT, {Op::Bt}},
    {ZYDIS_MNEMONIC_BTS, {Op::Bts}},
    {ZYDIS_MNEMONIC_BTR, {Op::Btr}},
    {ZYDIS_MNEMONIC_BTC, {Op::Btc}},
    {ZYDIS_MNEMONIC_BSF, {Op::Bsf}},
    {ZYDIS_MNEMONIC_BSR, {Op::Bsr}},
    {ZYDIS_MNEMONIC_TZCNT, {Op::Tzcnt}},
    {ZYDIS_MNEMONIC_LZCNT, {Op::Lzcnt}},
    {ZYDIS_MNEMONIC_POPCNT, {Op::Popcnt}},
    {ZYDIS_MNEMONIC_CRC32, {Op::Crc32}},
    {ZYDIS_MNEMONIC_BSWAP, {Op::Bswap}},
    {ZYDIS_MNEMONIC_MOV, {Op::Mov}},
    {ZYDIS_MNEMONIC_MOVBE, {Op::Movbe}},
    {ZYDIS_MNEMONIC_MOVNTI, {Op::Movnti}},
    {ZYDIS_MNEMONIC_MOVZX, {Op::Movzx}},
    {ZYDIS_MNEMONIC_MOVSX, {Op::Movsx}},
    {ZYDIS_MNEMONIC_MOVSXD, {Op::Movsxd}},
    {ZYDIS_MNEMONIC_LEA, {Op::Lea}},
    {ZYDIS_MNEMONIC_XCHG, {Op::Xchg}},
    {ZYDIS_MNEMONIC_LAHF, {Op::Lahf}},
    {ZYDIS_MNEMONIC_SAHF, {Op::Sahf}},
    {ZYDIS_MNEMONIC_XLAT, {Op::Xlat}},
    {ZYDIS_MNEMONIC_NOP, {Op::Nop}},
    {ZYDIS_MNEMONIC_PAUSE, {Op::Pause}},
    {ZYDIS_MNEMONIC_SALC, {Op::Salc}},
    {ZYDIS_MNEMONIC_PUSH, {Op::Push}},
    {ZYDIS_MNEMONIC_POP, {Op::Pop}},
    {ZYDIS_MNEMONIC_ENTER, {Op::Enter}},
    {ZYDIS_MNEMONIC_LEAVE, {Op::Leave}},
    {ZYDIS_MNEMONIC_JMP, {Op::Jmp}},
    {ZYDIS_MNEMONIC_LOOP, {Op::Loop}},
    {ZYDIS_MNEMONIC_LOOPE, {Op::Loope}},
    {ZYDIS_MNEMONIC_LOOPNE, {Op::Loopne}},
    {ZYDIS_MNEMONIC_CALL, {Op::Call}},
    {ZYDIS_MNEMONIC_RET, {Op::Ret}},
    {ZYDIS_MNEMONIC_INT3, {Op::Int3}},
    {ZYDIS_MNEMONIC_INT, {Op::Int}},
    {ZYDIS_MNEMONIC_INTO, {Op::Into}},
    {ZYDIS_MNEMONIC_INT1, {Op::Int1}},
    {ZYDIS_MNEMONIC_BOUND, {Op::Bound}},
    {ZYDIS_MNEMONIC_CLC, {Op::Clc}},
    {ZYDIS_MNEMONIC_STC, {Op::Stc}},
    {ZYDIS_MNEMONIC_CMC, {Op::Cmc}},
    {ZYDIS_MNEMONIC_CLD, {Op::Cld}},
    {ZYDIS_MNEMONIC_STD, {Op::Std}},
    {ZYDIS_MNEMONIC_CLI, {Op::Cli}},
    {ZYDIS_MNEMONIC_STI, {Op::Sti}},
    {ZYDIS_MNEMONIC_CLAC, {Op::Clac}},
    {ZYDIS_MNEMONIC_STAC, {Op::Stac}},
    {ZYDIS_MNEMONIC_IN, {Op::In}},
    {ZYDIS_MNEMONIC_OUT, {Op::Out}},
    {ZYDIS_MNEMONIC_LDS, {Op::Lds}},
    {ZYDIS_MNEMONIC_LES, {Op::Les}},
    {ZYDIS_MNEMONIC_LFS, {Op::Lfs}},
    {ZYDIS_MNEMONIC_LGS, {Op::Lgs}},
    {ZYDIS_MNEMONIC_LSS, {Op::Lss}},
    {ZYDIS_MNEMONIC_LGDT, {Op::Lgdt}},
    {ZYDIS_MNEMONIC_LIDT, {Op::Lidt}},
    {ZYDIS_MNEMONIC_LLDT, {Op::Lldt}},
    {ZYDIS_MNEMONIC_LTR, {Op::Ltr}},
    {ZYDIS_MNEMONIC_SGDT, {Op::Sgdt}},
    {ZYDIS_MNEMONIC_SIDT, {Op::Sidt}},
    {ZYDIS_MNEMONIC_SLDT, {Op::Sldt}},
    {ZYDIS_MNEMONIC_STR, {Op::Str}},
    {ZYDIS_MNEMONIC_LMSW, {Op::Lmsw}},
    {ZYDIS_MNEMONIC_SMSW, {Op::Smsw}},
    {ZYDIS_MNEMONIC_LAR, {Op::Lar}},
    {ZYDIS_MNEMONIC_LSL, {Op::Lsl}},
    {ZYDIS_MNEMONIC_VERR, {Op::Verr}},
    {ZYDIS_MNEMONIC_VERW, {Op::Verw}},
    {ZYDIS_MNEMONIC_ARPL, {Op::Arpl}},
    {ZYDIS_MNEMONIC_CLTS, {Op::Clts}},
    {ZYDIS_MNEMONIC_RDMSR, {Op::Rdmsr}},
    {ZYDIS_MNEMONIC_WRMSR, {Op::Wrmsr}},
    {ZYDIS_MNEMONIC_RDTSC, {Op::Rdtsc}},
    {ZYDIS_MNEMONIC_RDTSCP, {Op::Rdtscp}},
    {ZYDIS_MNEMONIC_RDPMC, {Op::Rdpmc}},
    {ZYDIS_MNEMONIC_RDPID, {Op::Rdpid}},
    {ZYDIS_MNEMONIC_CPUID, {Op::Cpuid}},
    {ZYDIS_MNEMONIC_HLT, {Op::Hlt}},
    {ZYDIS_MNEMONIC_INVD, {Op::Invd}},
    {ZYDIS_MNEMONIC_WBINVD, {Op::Wbinvd}},
    {ZYDIS_MNEMONIC_INVLPG, {Op::Invlpg}},
    {ZYDIS_MNEMONIC_INVPCID, {Op::Invpcid}},
    {ZYDIS_MNEMONIC_SYSCALL, {Op::Syscall}},
    {ZYDIS_MNEMONIC_SYSRET, {Op::Sysret}},
    {ZYDIS_MNEMONIC_SYSENTER, {Op::Sysenter}},
    {ZYDIS_MNEMONIC_SYSEXIT, {Op::Sysexit}},
    {ZYDIS_MNEMONIC_SWAPGS, {Op::Swapgs}},
    {ZYDIS_MNEMONIC_RDFSBASE, {Op::Rdfsbase}},
    {ZYDIS_MNEMONIC_RDGSBASE, {Op::Rdgsbase}},
    {ZYDIS_MNEMONIC_WRFSBASE, {Op::Wrfsbase}},
    {ZYDIS_MNEMONIC_WRGSBASE, {Op::Wrgsbase}},
    {ZYDIS_MNEMONIC_XGETBV, {Op::Xgetbv}},
    {ZYDIS_MNEMONIC_XSETBV, {Op::Xsetbv}},
    {ZYDIS_MNEMONIC_MONITOR, {Op::Monitor}},
    {ZYDIS_MNEMONIC_MWAIT, {Op::Mwait}},
    {ZYDIS_MNEMONIC_VMCALL, {Op::Vmcall, 0, true}},
    {ZYDIS_MNEMONIC_VMMCALL, {Op::Vmmcall, 0, true}},
    {ZYDIS_MNEMONIC_RSM, {Op::Rsm, 0, true}},
    {ZYDIS_MNEMONIC_RDRAND, {Op::Rdrand}},
    {ZYDIS_MNEMONIC_RDSEED, {Op::Rdseed}},
    {ZYDIS_MNEMONIC_LFENCE, {Op::Lfence}},
    {ZYDIS_MNEMONIC_MFENCE, {Op::Mfence}},
    {ZYDIS_MNEMONIC_SFENCE, {Op::Sfence}},
    {ZYDIS_MNEMONIC_CLFLUSH, {Op::Clflush}},
    {ZYDIS_MNEMONIC_CLFLUSHOPT, {Op::Clflushopt}},
    {ZYDIS_MNEMONIC_CLWB, {Op::Clwb}},
    {ZYDIS_MNEMONIC_CLZERO, {Op::Clzero}},
    {ZYDIS_MNEMONIC_SERIALIZE, {Op::Serialize}},
    {ZYDIS_MNEMONIC_RDPKRU, {Op::Rdpkru}},
    {ZYDIS_MNEMONIC_WRPKRU, {Op::Wrpkru}},
    {ZYDIS_MNEMONIC_LDMXCSR, {Op::Ldmxcsr}},
    {ZYDIS_MNEMONIC_STMXCSR, {Op::Stmxcsr}},
    {ZYDIS_MNEMONIC_EMMS, {Op::Emms}},
    {ZYDIS_MNEMONIC_VZEROUPPER, {Op::Vzeroupper}},
    {ZYDIS_MNEMONIC_VZEROALL, {Op::Vzeroall}},
    {ZYDIS_MNEMONIC_IMUL, {Op::Imul1}},
    {ZYDIS_MNEMONIC_CMOVB, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVBE, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVL, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVLE, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNB, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNBE, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNL, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNLE, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNO, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNP, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNS, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVNZ, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVO, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVP, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVS, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_CMOVZ, {Op::Cmovcc}},
    {ZYDIS_MNEMONIC_JB, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JBE, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JL, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JLE, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNB, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNBE, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNL, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNLE, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNO, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNP, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNS, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JNZ, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JO, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JP, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JS, {Op::Jcc}},
    {ZYDIS_MNEMONIC_JZ, {Op::Jcc}},
    {ZYDIS_MNEMONIC_SETB, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETBE, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETL, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETLE, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNB, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNBE, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNL, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNLE, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNO, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNP, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNS, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETNZ, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETO, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETP, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETS, {Op::Setcc}},
    {ZYDIS_MNEMONIC_SETZ, {Op::Setcc}},
    {ZYDIS_MNEMONIC_CBW, {Op::Cbw, 2}},
    {ZYDIS_MNEMONIC_CWDE, {Op::Cbw, 4}},
    {ZYDIS_MNEMONIC_CDQE, {Op::Cbw, 8}},
    {ZYDIS_MNEMONIC_CWD, {Op::Cwd, 2}},
    {ZYDIS_MNEMONIC_CDQ, {Op::Cwd, 4}},
    {ZYDIS_MNEMONIC_CQO, {Op::Cwd, 8}},
    {ZYDIS_MNEMONIC_PUSHA, {Op::Pusha, 2}},
    {ZYDIS_MNEMONIC_PUSHAD, {Op::Pusha, 4}},
    {ZYDIS_MNEMONIC_POPA, {Op::Popa, 2}},
    {ZYDIS_MNEMONIC_POPAD, {Op::Popa, 4}},
    {ZYDIS_MNEMONIC_PUSHF, {Op::Pushf, 2}},
    {ZYDIS_MNEMONIC_PUSHFD, {Op::Pushf, 4}},
    {ZYDIS_MNEMONIC_PUSHFQ, {Op::Pushf, 8}},
    {ZYDIS_MNEMONIC_POPF, {Op::Popf, 2}},
    {ZYDIS_MNEMONIC_POPFD, {Op::Popf, 4}},
    {ZYDIS_MNEMONIC_POPFQ, {Op::Popf, 8}},
    {ZYDIS_MNEMONIC_IRET, {Op::Iret, 2}},
    {ZYDIS_MNEMONIC_IRETD, {Op::Iret, 4}},
    {ZYDIS_MNEMONIC_IRETQ, {Op::Iret, 8}},
    {ZYDIS_MNEMONIC_JCXZ, {Op::Jcxz}},
    {ZYDIS_MNEMONIC_JECXZ, {Op::Jcxz}},
    {ZYDIS_MNEMONIC_JRCXZ, {Op::Jcxz}},
    {ZYDIS_MNEMONIC_UD0, {Op::Ud, 0, true}},
    {ZYDIS_MNEMONIC_UD1, {Op::Ud, 0, true}},
    {ZYDIS_MNEMONIC_UD2, {Op::Ud, 0, true}},
    {ZYDIS_MNEMONIC_MOVSB, {Op::Movs}},
    {ZYDIS_MNEMONIC_MOVSW, {Op::Movs}},
    {ZYDIS_MNEMONIC_MOVSD, {Op::Movs}},
    {ZYDIS_MNEMONIC_MOVSQ, {Op::Movs}},
    {ZYDIS_MNEMONIC_CMPSB, {Op::Cmps}},
    {ZYDIS_MNEMONIC_CMPSW, {Op::Cmps}},
    {ZYDIS_MNEMONIC_CMPSD, {Op::Cmps}},
    {ZYDIS_MNEMONIC_CMPSQ, {Op::Cmps}},
    {ZYDIS_MNEMONIC_SCASB, {Op::Scas}},
    {ZYDIS_MNEMONIC_SCASW, {Op::Scas}},
    {ZYDIS_MNEMONIC_SCASD, {Op::Scas}},
    {ZYDIS_MNEMONIC_SCASQ, {Op::Scas}},
    {ZYDIS_MNEMONIC_LODSB, {Op::Lods}},
    {ZYDIS_MNEMONIC_LODSW, {Op::Lods}},
    {ZYDIS_MNEMONIC_LODSD, {Op::Lods}},
    {ZYDIS_MNEMONIC_LODSQ, {Op::Lods}},
    {ZYDIS_MNEMONIC_STOSB, {Op::Stos}},
    {ZYDIS_MNEMONIC_STOSW, {Op::Stos}},
    {ZYDIS_MNEMONIC_STOSD, {Op::Stos}},
    {ZYDIS_MNEMONIC_STOSQ, {Op::Stos}},
    {ZYDIS_MNEMONIC_INSB, {Op::Ins}},
    {ZYDIS_MNEMONIC_INSW, {Op::Ins}},
    {ZYDIS_MNEMONIC_INSD, {Op::Ins}},
    {ZYDIS_MNEMONIC_OUTSB, {Op::Outs}},
    {ZYDIS_MNEMONIC_OUTSW, {Op::Outs}},
    {ZYDIS_MNEMONIC_OUTSD, {Op::Outs}},
    {ZYDIS_MNEMONIC_PREFETCH, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_PREFETCHNTA, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_PREFETCHT0, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_PREFETCHT1, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_PREFETCHT2, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_PREFETCHW, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_PREFETCHWT1, {Op::Prefetch, 0, true}},
    {ZYDIS_MNEMONIC_ENDBR32, {Op::Nop, 0, true}},
    {ZYDIS_MNEMONIC_ENDBR64, {Op::Nop, 0, true}},
    {ZYDIS_MNEMONIC_FXSAVE, {Op::Fxsave, 4}},
    {ZYDIS_MNEMONIC_FXSAVE64, {Op::Fxsave, 8}},
    {ZYDIS_MNEMONIC_FXRSTOR, {Op::Fxrstor, 4}},
    {ZYDIS_MNEMONIC_FXRSTOR64, {Op::Fxrstor, 8}},
    {ZYDIS_MNEMONIC_XSAVE, {Op::Xsave, 4}},
    {ZYDIS_MNEMONIC_XSAVE64, {Op::Xsave, 8}},
    {ZYDIS_MNEMONIC_XSAVEOPT, {Op::Xsaveopt, 4}},
    {ZYDIS_MNEMONIC_XSAVEOPT64, {Op::Xsaveopt, 8}},
    {ZYDIS_MNEMONIC_XSAVEC, {Op::Xsavec, 4}},
    {ZYDIS_MNEMONIC_XSAVEC64, {Op::Xsavec, 8}},
    {ZYDIS_MNEMONIC_XSAVES, {Op::Xsaves, 4}},
    {ZYDIS_MNEMONIC_XSAVES64, {Op::Xsaves, 8}},
    {ZYDIS_MNEMONIC_XRSTOR, {Op::Xrstor, 4}},
    {ZYDIS_MNEMONIC_XRSTOR64, {Op::Xrstor, 8}},
    {ZYDIS_MNEMONIC_XRSTORS, {Op::Xrstors, 4}},
    {ZYDIS_MNEMONIC_XRSTORS64, {Op::Xrstors, 8}},
    {ZYDIS_MNEMONIC_VLDMXCSR, {Op::Ldmxcsr}},
    {ZYDIS_MNEMONIC_VSTMXCSR, {Op::Stmxcsr}},
    {ZYDIS_MNEMONIC_FWAIT, {Op::Fwait}},
    {ZYDIS_MNEMONIC_MASKMOVQ, {Op::Maskmov}},
    {ZYDIS_MNEMONIC_MASKMOVDQU, {Op::Maskmov}},
    {ZYDIS_MNEMONIC_VMASKMOVDQU, {Op::Maskmov}},
    {ZYDIS_MNEMONIC_VMASKMOVPS, {Op::Vmaskmov}},
    {ZYDIS_MNEMONIC_VMASKMOVPD, {Op::Vmaskmov}},
    {ZYDIS_MNEMONIC_VPMASKMOVD, {Op::Vmaskmov}},
    {ZYDIS_MNEMONIC_VPMASKMOVQ, {Op::Vmaskmov}},
    {ZYDIS_MNEMONIC_VGATHERDPS, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VGATHERDPD, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VGATHERQPS, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VGATHERQPD, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VPGATHERDD, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VPGATHERDQ, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VPGATHERQD, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VPGATHERQQ, {Op::Vgather}},
    {ZYDIS_MNEMONIC_VSCATTERDPS, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VSCATTERDPD, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VSCATTERQPS, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VSCATTERQPD, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VPSCATTERDD, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VPSCATTERDQ, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VPSCATTERQD, {Op::Vscatter}},
    {ZYDIS_MNEMONIC_VPSCATTERQQ, {Op::Vscatter}},
};
// clang-format on

/// Indexed by mnemonic.
const std::array<OpRow, ZYDIS_MNEMONIC_MAX_VALUE + 1> kRows = [] {
  std::array<OpRow, ZYDIS_MNEMONIC_MAX_VALUE + 1> rows{};
  for (const Pair& p : kPairs) rows[p.mnemonic] = p.row;
  return rows;
}();

}  // namespace

OpRow op_row(ZydisMnemonic mnemonic) {
  return mnemonic <= ZYDIS_MNEMONIC_MAX_VALUE ? kRows[mnemonic] : OpRow{};
}

Feature feature_of(ZydisISASet isa_set) {
  switch (isa_set) {
    case ZYDIS_ISA_SET_FAT_NOP:
    case ZYDIS_ISA_SET_I186:
    case ZYDIS_ISA_SET_I286PROTECTED:
    case ZYDIS_ISA_SET_I286REAL:
    case ZYDIS_ISA_SET_I386:
    case ZYDIS_ISA_SET_I486:
    case ZYDIS_ISA_SET_I486REAL:
    case ZYDIS_ISA_SET_I86:
    case ZYDIS_ISA_SET_LONGMODE:
    case ZYDIS_ISA_SET_PAUSE:
    case ZYDIS_ISA_SET_PENTIUMREAL:
    case ZYDIS_ISA_SET_PPRO:
    case ZYDIS_ISA_SET_PREFETCH_NOP:
    case ZYDIS_ISA_SET_RDPMC:
    case ZYDIS_ISA_SET_SSE_PREFETCH:
    case ZYDIS_ISA_SET_AMD:
    case ZYDIS_ISA_SET_PREFETCHWT1:
      return Feature::Base;
    case ZYDIS_ISA_SET_AES:
    case ZYDIS_ISA_SET_AVXAES:
      return Feature::Aes;
    case ZYDIS_ISA_SET_ADOX_ADCX:
      return Feature::Adx;
    case ZYDIS_ISA_SET_AVX:
      return Feature::Avx;
    case ZYDIS_ISA_SET_AVX2:
    case ZYDIS_ISA_SET_AVX2GATHER:
      return Feature::Avx2;
    case ZYDIS_ISA_SET_AVX_GFNI:
    case ZYDIS_ISA_SET_GFNI:
      return Feature::Gfni;
    case ZYDIS_ISA_SET_BMI1:
      return Feature::Bmi1;
    case ZYDIS_ISA_SET_BMI2:
      return Feature::Bmi2;
    case ZYDIS_ISA_SET_CLFLUSHOPT:
      return Feature::Clflushopt;
    case ZYDIS_ISA_SET_CLFSH:
      return Feature::Clflush;
    case ZYDIS_ISA_SET_CLWB:
      return Feature::Clwb;
    case ZYDIS_ISA_SET_CLZERO:
      return Feature::Clzero;
    case ZYDIS_ISA_SET_CMOV:
      return Feature::Cmov;
    case ZYDIS_ISA_SET_FCMOV:
    case ZYDIS_ISA_SET_X87:
      return Feature::X87;
    case ZYDIS_ISA_SET_CMPXCHG16B:
      return Feature::Cx16;
    case ZYDIS_ISA_SET_F16C:
      return Feature::F16c;
    case ZYDIS_ISA_SET_FMA:
      return Feature::Fma;
    case ZYDIS_ISA_SET_FXSAVE:
    case ZYDIS_ISA_SET_FXSAVE64:
      return Feature::Fxsr;
    case ZYDIS_ISA_SET_INVPCID:
      return Feature::Invpcid;
    case ZYDIS_ISA_SET_LAHF:
      return Feature::LahfLm;
    case ZYDIS_ISA_SET_LZCNT:
      return Feature::Lzcnt;
    case ZYDIS_ISA_SET_MONITOR:
      return Feature::Monitor;
    case ZYDIS_ISA_SET_MOVBE:
      return Feature::Movbe;
    case ZYDIS_ISA_SET_PCLMULQDQ:
      return Feature::Pclmul;
    case ZYDIS_ISA_SET_PENTIUMMMX:
      return Feature::Mmx;
    case ZYDIS_ISA_SET_PKU:
      return Feature::Pku;
    case ZYDIS_ISA_SET_POPCNT:
      return Feature::Popcnt;
    case ZYDIS_ISA_SET_RDPID:
      return Feature::Rdpid;
    case ZYDIS_ISA_SET_RDRAND:
      return Feature::Rdrand;
    case ZYDIS_ISA_SET_RDSEED:
      return Feature::Rdseed;
    case ZYDIS_ISA_SET_RDTSCP:
      return Feature::Rdtscp;
    case ZYDIS_ISA_SET_RDWRFSGS:
      return Feature::Fsgsbase;
    case ZYDIS_ISA_SET_SERIALIZE:
      return Feature::Serialize;
    case ZYDIS_ISA_SET_SHA:
      return Feature::Sha;
    case ZYDIS_ISA_SET_SMAP:
      return Feature::Smap;
    case ZYDIS_ISA_SET_SSE:
    case ZYDIS_ISA_SET_SSEMXCSR:
      return Feature::Sse;
    case ZYDIS_ISA_SET_SSE2:
    case ZYDIS_ISA_SET_SSE2MMX:
      return Feature::Sse2;
    case ZYDIS_ISA_SET_SSE3:
    case ZYDIS_ISA_SET_SSE3X87:
      return Feature::Sse3;
    case ZYDIS_ISA_SET_SSE4:
      return Feature::Sse41;
    case ZYDIS_ISA_SET_SSE42:
      return Feature::Sse42;
    case ZYDIS_ISA_SET_SSE4A:
      return Feature::Sse4a;
    case ZYDIS_ISA_SET_SSSE3:
    case ZYDIS_ISA_SET_SSSE3MMX:
      return Feature::Ssse3;
    case ZYDIS_ISA_SET_VAES:
      return Feature::Vaes;
    case ZYDIS_ISA_SET_VPCLMULQDQ:
      return Feature::Vpclmul;
    case ZYDIS_ISA_SET_XSAVE:
      return Feature::Xsave;
    case ZYDIS_ISA_SET_XSAVEC:
      return Feature::Xsavec;
    case ZYDIS_ISA_SET_XSAVEOPT:
      return Feature::Xsaveopt;
    case ZYDIS_ISA_SET_XSAVES:
      return Feature::Xsaves;
    case ZYDIS_ISA_SET_AVX512F_128:
    case ZYDIS_ISA_SET_AVX512F_128N:
    case ZYDIS_ISA_SET_AVX512F_256:
    case ZYDIS_ISA_SET_AVX512F_512:
    case ZYDIS_ISA_SET_AVX512F_KOP:
    case ZYDIS_ISA_SET_AVX512F_SCALAR:
      return Feature::Avx512f;
    case ZYDIS_ISA_SET_AVX512BW_128:
    case ZYDIS_ISA_SET_AVX512BW_128N:
    case ZYDIS_ISA_SET_AVX512BW_256:
    case ZYDIS_ISA_SET_AVX512BW_512:
    case ZYDIS_ISA_SET_AVX512BW_KOP:
      return Feature::Avx512bw;
    case ZYDIS_ISA_SET_AVX512CD_128:
    case ZYDIS_ISA_SET_AVX512CD_256:
    case ZYDIS_ISA_SET_AVX512CD_512:
      return Feature::Avx512cd;
    case ZYDIS_ISA_SET_AVX512DQ_128:
    case ZYDIS_ISA_SET_AVX512DQ_128N:
    case ZYDIS_ISA_SET_AVX512DQ_256:
    case ZYDIS_ISA_SET_AVX512DQ_512:
    case ZYDIS_ISA_SET_AVX512DQ_KOP:
    case ZYDIS_ISA_SET_AVX512DQ_SCALAR:
      return Feature::Avx512dq;
    case ZYDIS_ISA_SET_AVX512_BF16_128:
    case ZYDIS_ISA_SET_AVX512_BF16_256:
    case ZYDIS_ISA_SET_AVX512_BF16_512:
      return Feature::Avx512bf16;
    case ZYDIS_ISA_SET_AVX512_BITALG_128:
    case ZYDIS_ISA_SET_AVX512_BITALG_256:
    case ZYDIS_ISA_SET_AVX512_BITALG_512:
      return Feature::Avx512bitalg;
    case ZYDIS_ISA_SET_AVX512_FP16_128:
    case ZYDIS_ISA_SET_AVX512_FP16_128N:
    case ZYDIS_ISA_SET_AVX512_FP16_256:
    case ZYDIS_ISA_SET_AVX512_FP16_512:
    case ZYDIS_ISA_SET_AVX512_FP16_SCALAR:
      return Feature::Avx512fp16;
    case ZYDIS_ISA_SET_AVX512_GFNI_128:
    case ZYDIS_ISA_SET_AVX512_GFNI_256:
    case ZYDIS_ISA_SET_AVX512_GFNI_512:
      return Feature::Gfni;
    case ZYDIS_ISA_SET_AVX512_IFMA_128:
    case ZYDIS_ISA_SET_AVX512_IFMA_256:
    case ZYDIS_ISA_SET_AVX512_IFMA_512:
      return Feature::Avx512ifma;
    case ZYDIS_ISA_SET_AVX512_VAES_128:
    case ZYDIS_ISA_SET_AVX512_VAES_256:
    case ZYDIS_ISA_SET_AVX512_VAES_512:
      return Feature::Vaes;
    case ZYDIS_ISA_SET_AVX512_VBMI2_128:
    case ZYDIS_ISA_SET_AVX512_VBMI2_256:
    case ZYDIS_ISA_SET_AVX512_VBMI2_512:
      return Feature::Avx512vbmi2;
    case ZYDIS_ISA_SET_AVX512_VBMI_128:
    case ZYDIS_ISA_SET_AVX512_VBMI_256:
    case ZYDIS_ISA_SET_AVX512_VBMI_512:
      return Feature::Avx512vbmi;
    case ZYDIS_ISA_SET_AVX512_VNNI_128:
    case ZYDIS_ISA_SET_AVX512_VNNI_256:
    case ZYDIS_ISA_SET_AVX512_VNNI_512:
      return Feature::Avx512vnni;
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_128:
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_256:
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_512:
      return Feature::Avx512vp2intersect;
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_128:
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_256:
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_512:
      return Feature::Vpclmul;
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_128:
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_256:
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_512:
      return Feature::Avx512vpopcntdq;
    default:
      return Feature::Unsupported;
  }
}

bool needs_vl(ZydisISASet isa_set) {
  switch (isa_set) {
    case ZYDIS_ISA_SET_AVX512F_128: case ZYDIS_ISA_SET_AVX512F_256:
    case ZYDIS_ISA_SET_AVX512BW_128: case ZYDIS_ISA_SET_AVX512BW_256:
    case ZYDIS_ISA_SET_AVX512CD_128: case ZYDIS_ISA_SET_AVX512CD_256:
    case ZYDIS_ISA_SET_AVX512DQ_128: case ZYDIS_ISA_SET_AVX512DQ_256:
    case ZYDIS_ISA_SET_AVX512_BF16_128: case ZYDIS_ISA_SET_AVX512_BF16_256:
    case ZYDIS_ISA_SET_AVX512_BITALG_128: case ZYDIS_ISA_SET_AVX512_BITALG_256:
    case ZYDIS_ISA_SET_AVX512_FP16_128: case ZYDIS_ISA_SET_AVX512_FP16_256:
    case ZYDIS_ISA_SET_AVX512_GFNI_128: case ZYDIS_ISA_SET_AVX512_GFNI_256:
    case ZYDIS_ISA_SET_AVX512_IFMA_128: case ZYDIS_ISA_SET_AVX512_IFMA_256:
    case ZYDIS_ISA_SET_AVX512_VAES_128: case ZYDIS_ISA_SET_AVX512_VAES_256:
    case ZYDIS_ISA_SET_AVX512_VBMI2_128: case ZYDIS_ISA_SET_AVX512_VBMI2_256:
    case ZYDIS_ISA_SET_AVX512_VBMI_128: case ZYDIS_ISA_SET_AVX512_VBMI_256:
    case ZYDIS_ISA_SET_AVX512_VNNI_128: case ZYDIS_ISA_SET_AVX512_VNNI_256:
    case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_128: case ZYDIS_ISA_SET_AVX512_VP2INTERSECT_256:
    case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_128: case ZYDIS_ISA_SET_AVX512_VPCLMULQDQ_256:
    case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_128: case ZYDIS_ISA_SET_AVX512_VPOPCNTDQ_256:
      return true;
    default:
      return false;
  }
}

}  // namespace ring3::engine
