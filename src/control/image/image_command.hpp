#pragma once
#include <string>
#include <vector>

namespace ring3::control {

/// `ring3 image VERB ...`: arguments after "image". Returns the exit status: 0, 2 for bad usage and failures of the
/// host; `check` gives 2 when it could not check, 3 for leaks only and 4 for corruption that is left.
int image_command(const std::vector<std::string>& arguments);

}  // namespace ring3::control
