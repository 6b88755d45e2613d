#pragma once
#include <cstddef>
#include <optional>
#include <span>

#include "base/types.hpp"

namespace ring3::fs {

/// Of a request, whether its answer is known before it is served, so that nobody has to wait for that.
///
/// Which:     FORGET and BATCH_FORGET, which have no answer; RELEASEDIR, and RELEASE of a file that was not open for writing, whose
///            answer the guest's kernel does not look at. The last close of a file that was written is waited for: who hears of it may
///            want to execute that file on the host (ETXTBSY).
/// Order:     such a request may be served after later ones; counts and handles are the same in any order.
/// Trust:     the request is the guest's. What is no whole message of these kinds is not deferred.
/// Returns the answer's length, written to `reply`, or 0 for none; nothing: the request is to be served first.
std::optional<std::size_t> deferred_answer(std::span<const u8> request, std::span<u8> reply);

}  // namespace ring3::fs
