#include "base/check.hpp"

#include <cstdio>
#include <cstdlib>

namespace ring3::detail {

void check_failed(const char* expression, const char* file, int line) {
  std::fprintf(stderr, "ring3: internal error: %s does not hold at %s:%d\n", expression, file, line);
  std::abort();
}

}  // namespace ring3::detail
