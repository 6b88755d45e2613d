#pragma once
#include "control/cli/options.hpp"

/// The verbs. Each returns the exit status and has printed what there is to say.
namespace ring3::control {

inline constexpr int kSuccess = 0;
inline constexpr int kFailure = 2;       ///< bad usage, or the host failed
inline constexpr int kGuestFailure = 3;  ///< the guest panicked or triple-faulted
inline constexpr int kKeyboard = 130;

/// Boots and runs a VM in the foreground. Takes over the process's signals and its terminal meanwhile.
int run(const RunOptions& options);
/// Runs another program on ring3's KVM; returns only when that fails.
int with(const WithOptions& options);
int doctor(const DoctorOptions& options);
int print_version(const VersionOptions& options);

/// Writes text to standard output; kFailure, with a message, when that does not work.
int print(const std::string& text);
/// "ring3: message" on standard error; returns kFailure.
int fail(const std::string& message);

/// The whole command.
int main_with(const std::vector<std::string>& arguments);

}  // namespace ring3::control
