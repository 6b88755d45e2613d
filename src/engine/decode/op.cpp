#include "engine/decode/op.hpp"

#include <iterator>

namespace ring3::engine {
namespace {

// In the order of enum class Op.
constexpr const char* kNames[] = {
    "invalid", "add", "or", "adc", "sbb", "and", "sub", "xor", "cmp", "test", "inc", "dec", "neg", "not",
    "xadd", "cmpxchg", "cmpxchg8b", "cmpxchg16b", "adcx", "adox", "andn", "bextr", "blsi", "blsmsk",
    "blsr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx", "mul", "imul1", "imul2",
    "imul3", "div", "idiv", "aaa", "aad", "aam", "aas", "daa", "das", "rol", "ror", "rcl", "rcr", "shl",
    "shr", "sar", "shld", "shrd", "bt", "bts", "btr", "btc", "bsf", "bsr", "tzcnt", "lzcnt", "popcnt",
    "crc32", "bswap", "mov", "movbe", "movnti", "movzx", "movsx", "movsxd", "lea", "xchg", "cmovcc",
    "setcc", "cbw", "cwd", "lahf", "sahf", "xlat", "nop", "pause", "prefetch", "endbr", "salc", "push",
    "pop", "pusha", "popa", "pushf", "popf", "enter", "leave", "jmp", "jcc", "jcxz", "loop", "loope",
    "loopne", "call", "ret", "callfar", "jmpfar", "retfar", "iret", "int3", "int", "into", "int1", "ud",
    "bound", "movs", "cmps", "scas", "lods", "stos", "ins", "outs", "clc", "stc", "cmc", "cld", "std",
    "cli", "sti", "clac", "stac", "in", "out", "movseg", "pushseg", "popseg", "lds", "les", "lfs", "lgs",
    "lss", "lgdt", "lidt", "lldt", "ltr", "sgdt", "sidt", "sldt", "str", "lmsw", "smsw", "lar", "lsl",
    "verr", "verw", "arpl", "clts", "movcr", "movdr", "rdmsr", "wrmsr", "rdtsc", "rdtscp", "rdpmc",
    "rdpid", "cpuid", "hlt", "invd", "wbinvd", "invlpg", "invpcid", "syscall", "sysret", "sysenter",
    "sysexit", "swapgs", "rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase", "xgetbv", "xsetbv", "monitor",
    "mwait", "vmcall", "vmmcall", "rsm", "rdrand", "rdseed", "lfence", "mfence", "sfence", "clflush",
    "clflushopt", "clwb", "clzero", "serialize", "rdpkru", "wrpkru", "fxsave", "fxrstor", "xsave",
    "xsaveopt", "xsavec", "xsaves", "xrstor", "xrstors", "ldmxcsr", "stmxcsr", "emms", "fwait",
    "vzeroupper", "vzeroall", "hostx87", "hostmmx", "hostvec", "maskmov", "vmaskmov", "vgather", "vscatter",
};
static_assert(std::size(kNames) == static_cast<unsigned>(Op::Count));

}  // namespace

const char* name(Op op) { return op < Op::Count ? kNames[static_cast<unsigned>(op)] : "?"; }

}  // namespace ring3::engine
