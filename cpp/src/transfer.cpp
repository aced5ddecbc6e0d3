#include "transfer.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>

namespace aliked::core {
namespace {

// Images go out in parts of so many bytes: one is on its way while the next is prepared.
constexpr size_t PART = 256 << 10;

// Copy what only the device will read. Stores past the cache need not read the lines that they
// write: on an H100's host they take 10 us off an image of 640x480 (docs/cpp.md).
void copy_past_cache(unsigned char *to, const unsigned char *from, size_t size) {
#if defined(__SSE2__)
  constexpr size_t WORD = sizeof(__m128i);
  const size_t head = std::min(size, -size_t(to) % WORD);
  std::memcpy(to, from, head);
  size_t at = head;
  for (; at + 4 * WORD <= size; at += 4 * WORD) {
    __m128i words[4];
    for (size_t i = 0; i < 4; ++i) words[i] = _mm_loadu_si128((const __m128i *)(from + at) + i);
    for (size_t i = 0; i < 4; ++i) _mm_stream_si128((__m128i *)(to + at) + i, words[i]);
  }
  std::memcpy(to + at, from + at, size - at);
  _mm_sfence();  // the copy to the device must find all of it
#else
  std::memcpy(to, from, size);
#endif
}

size_t row_bytes(const aliked_images &images) { return size_t(images.width) * 3; }
size_t row_stride(const aliked_images &images) {
  return images.row_stride ? images.row_stride : row_bytes(images);
}
size_t image_stride(const aliked_images &images) {
  return images.image_stride ? images.image_stride : row_stride(images) * size_t(images.height);
}

// Whether all rows follow each other without a gap, from image to image.
bool is_packed(const aliked_images &images) {
  return row_stride(images) == row_bytes(images) &&
         (images.batch == 1 ||
          image_stride(images) == row_bytes(images) * size_t(images.height));
}

// Ordinary memory: rows into the staging buffer, and on to the device part by part.
void upload_staged(CUstream stream, const aliked_images &images, CUdeviceptr to,
                   unsigned char *staging) {
  const size_t row = row_bytes(images);
  size_t done = 0, sent = 0;
  const auto send = [&] {
    check(driver().cuMemcpyHtoDAsync(to + sent, staging + sent, done - sent, stream),
          "copy an image to the GPU");
    sent = done;
  };
  const auto copy = [&](const unsigned char *from, size_t size) {
    for (size_t at = 0; at < size;) {
      const size_t count = std::min(size - at, PART - (done - sent));
      copy_past_cache(staging + done, from + at, count);
      done += count, at += count;
      if (done - sent == PART) send();
    }
  };
  const size_t all = row * size_t(images.height) * size_t(images.batch);
  if (is_packed(images)) {
    copy(images.data, all);
  } else {
    for (int b = 0; b < images.batch; ++b)
      for (int y = 0; y < images.height; ++y)
        copy(images.data + size_t(b) * image_stride(images) + size_t(y) * row_stride(images), row);
  }
  if (sent < done) send();
}

// Memory that the device reads by itself.
void upload_direct(CUstream stream, const aliked_images &images, CUdeviceptr to) {
  const size_t row = row_bytes(images), image = row * size_t(images.height);
  const bool on_device = images.memory == ALIKED_DEVICE;
  if (is_packed(images)) {
    const size_t all = image * size_t(images.batch);
    check(on_device ? driver().cuMemcpyDtoDAsync(to, CUdeviceptr(images.data), all, stream)
                    : driver().cuMemcpyHtoDAsync(to, images.data, all, stream),
          "copy an image to the GPU");
    return;
  }
  for (int b = 0; b < images.batch; ++b) {
    const unsigned char *from = images.data + size_t(b) * image_stride(images);
    CUDA_MEMCPY2D copy = {};
    copy.srcMemoryType = on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    copy.srcDevice = on_device ? CUdeviceptr(from) : 0;
    copy.srcHost = on_device ? nullptr : from;
    copy.srcPitch = row_stride(images);
    copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    copy.dstDevice = to + size_t(b) * image;
    copy.dstPitch = copy.WidthInBytes = row;
    copy.Height = size_t(images.height);
    check(driver().cuMemcpy2DAsync(&copy, stream), "copy an image to the GPU");
  }
}

}  // namespace

Frame check_images(const aliked_images *images) {
  require(images, "there are no images: the pointer is null");
  require(images->data, "the images' data is a null pointer");
  require(images->memory == ALIKED_HOST || images->memory == ALIKED_PAGE_LOCKED ||
              images->memory == ALIKED_DEVICE,
          text("the images are in no memory that is known (%d)", int(images->memory)));
  const Frame frame{images->batch, images->height, images->width};
  if (frame.width > 0)  // `Network::keypoints` refuses sizes, in its own words
    require(row_stride(*images) >= row_bytes(*images),
            text("the images' row stride of %zu bytes is less than a row of %d pixels takes",
                 images->row_stride, images->width));
  if (frame.batch > 1 && frame.width > 0 && frame.height > 0)
    require(image_stride(*images) >=
                row_stride(*images) * size_t(frame.height - 1) + row_bytes(*images),
            text("the images' stride of %zu bytes is less than an image takes",
                 images->image_stride));
  return frame;
}

void upload(CUstream stream, const aliked_images &images, CUdeviceptr to,
            const HostMemory &staging) {
  if (images.memory == ALIKED_HOST) upload_staged(stream, images, to, staging.get());
  else upload_direct(stream, images, to);
}

}  // namespace aliked::core
