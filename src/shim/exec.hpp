#pragma once
#include <alloca.h>
#include <stddef.h>

/// The preload goes along when a program makes an environment of its own for what it executes.
namespace ring3::shim {

/// Keeps what this process was given. In the constructor.
void remember_environment();
/// How many pointers carried() needs at most.
size_t carried_size(char* const* env);
/// The environment with the preload in it: `env` itself when it has it already, else a copy in `room` that shares the
/// strings. Allocates nothing: the caller may be a child of vfork(2).
char* const* carried(char* const* env, char** room);

}  // namespace ring3::shim

/// A macro because the room is the caller's stack.
#define RING3_CARRY(name, env)                                                                               \
  char* const* name = ::ring3::shim::carried(                                                                \
      (env), static_cast<char**>(alloca(sizeof(char*) * ::ring3::shim::carried_size(env))))
