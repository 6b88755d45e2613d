#pragma once
#include <string>
#include <vector>

/// The verbs about VMs that run already: ps, stop, console, logs, rm.
namespace ring3::control {

bool is_life_verb(const std::string& word);
/// The whole command line, the verb first. Returns the exit status and has printed what there is to say.
int life_command(const std::vector<std::string>& arguments);

/// Connects this terminal to a detached VM's console; returns when the user detaches or the VM ends.
int attach_console(const std::string& name);

}  // namespace ring3::control
