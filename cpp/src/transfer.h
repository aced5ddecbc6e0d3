// Copies between the caller's memory and the library's.
#pragma once

#include "aliked.h"
#include "driver.h"
#include "network.h"

namespace aliked::core {

// The frame of a batch; throws ALIKED_BAD_ARGUMENT where pointer, memory or strides are wrong.
Frame check_images(const aliked_images *images);

// Queue the copy of a batch to the device. What lies in ordinary memory goes through `staging`,
// which must not be in use; it may be changed when this returns.
void upload(CUstream stream, const aliked_images &images, CUdeviceptr to,
            const HostMemory &staging);

}  // namespace aliked::core
