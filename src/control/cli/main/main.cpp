#include <exception>
#include <new>
#include <string>
#include <vector>

#include "control/cli/commands.hpp"

int main(int argc, char** argv) {
  try {
    return ring3::control::main_with(std::vector<std::string>(argv + (argc > 0 ? 1 : 0), argv + argc));
  } catch (const std::bad_alloc&) {
    return ring3::control::fail("out of memory");
  } catch (const std::exception& e) {
    return ring3::control::fail(std::string("unexpected failure: ") + e.what());
  }
}
