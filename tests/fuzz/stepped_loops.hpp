#pragma once
/// The event loops of devices without their threads, for fuzz targets: stepped_loops.cpp takes the place of
/// devices/virtio/core/event_loop_thread.cpp, and the handlers run when and where the target says.
namespace ring3::virtio {

/// One round of every loop that was started: what is ready now, without waiting. False: nothing was.
bool step_loops();

}  // namespace ring3::virtio
