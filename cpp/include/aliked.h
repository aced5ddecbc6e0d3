/* ALIKED keypoints and descriptors on NVIDIA GPUs, in half precision: a C interface.
 *
 * Nothing but the NVIDIA driver is needed at run time, and it is loaded by name: on a machine
 * without one the library loads, and says so when an extractor is created.
 *
 * Every function that can fail returns an `aliked_status`; `aliked_last_error()` then has one
 * sentence about it. An extractor or matcher may be used from any thread; calls on the same one
 * wait for each other, so give every thread its own. Sizes are pixels, strides bytes.
 */
#ifndef ALIKED_H
#define ALIKED_H

#include <stddef.h>

#define ALIKED_VERSION "1.1.0"
#define ALIKED_FORMAT_VERSION 1 /* of the weights files that it reads */

#if defined(_WIN32)
#define ALIKED_API
#else
#define ALIKED_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum aliked_status {
  ALIKED_OK = 0,
  ALIKED_BAD_ARGUMENT = 1,       /* a null pointer, a size, a stride */
  ALIKED_NO_DRIVER = 2,          /* no NVIDIA driver, or one that is too old */
  ALIKED_NO_DEVICE = 3,          /* no GPU of that number */
  ALIKED_UNSUPPORTED_DEVICE = 4, /* no kernels for this GPU */
  ALIKED_NO_FILE = 5,            /* the weights file cannot be read */
  ALIKED_BAD_WEIGHTS = 6,        /* damaged, of another version, or of another model */
  ALIKED_OUT_OF_MEMORY = 7,      /* of the GPU or of the host */
  ALIKED_CUDA_ERROR = 8,         /* anything else that the driver reports */
  ALIKED_INTERNAL_ERROR = 9
} aliked_status;

#ifdef __cplusplus /* every int is a value: one that is none of these is refused */
typedef enum aliked_memory : int {
#else
typedef enum aliked_memory {
#endif
  ALIKED_HOST = 0,        /* ordinary memory */
  ALIKED_PAGE_LOCKED = 1, /* of `aliked_allocate`, cudaHostAlloc or cuMemHostRegister: no copy */
  ALIKED_DEVICE = 2       /* of the extractor's GPU */
} aliked_memory;

typedef struct aliked_extractor aliked_extractor;
typedef struct aliked_matcher aliked_matcher;
typedef void *aliked_stream; /* a CUstream or cudaStream_t of the device's primary context */

/* What to select, and where to run. Start from `ALIKED_OPTIONS`. */
typedef struct aliked_options {
  size_t size;       /* sizeof(aliked_options); a library also takes those of older headers */
  int device;        /* number of the GPU */
  int top_k;         /* the best so many keypoints; 0 or less: those above `scores_th` */
  float scores_th;   /* detection score in [0, 1] */
  int n_limit;       /* most keypoints of an image above `scores_th`; not used with top_k */
  int max_plans;     /* image sizes whose buffers are kept; the one unused for longest goes */
  const char *model; /* the model that the file must be of, or null */
  int strict;        /* where no score is above `scores_th`: 1, no keypoint; 0, those above the
                        image's mean score, as in the official code. Since 1.1, before it 0 */
} aliked_options;
#define ALIKED_OPTIONS {sizeof(aliked_options), 0, 1000, 0.2f, 5000, 16, 0, 1}

typedef struct aliked_info {
  char model[64];       /* "aliked-n16rot" */
  char device[256];     /* the GPU's name */
  int capability;       /* 90 for 9.0 */
  int descriptor_length;
  int top_k, n_limit;   /* as in the options; top_k is 0 in threshold mode */
  float scores_th;
  size_t device_memory; /* bytes that the extractor holds now, weights included */
} aliked_info;

/* Images of one size: 8-bit RGB, three bytes a pixel, both sides at least 5. A stride of 0 means
 * that rows, or images, follow each other without a gap. */
typedef struct aliked_images {
  const unsigned char *data;
  aliked_memory memory;
  int batch, height, width;
  size_t row_stride;   /* bytes from a row to the next */
  size_t image_stride; /* bytes from an image to the next */
} aliked_images;

/* Features of a batch. Rows count[b] and later of image b are none. Keypoints are (x, y) in pixels,
 * the centre of the top left pixel is (0, 0); descriptors have unit length. The order is that of
 * the detection score, largest first; in threshold mode row by row of the image. */
typedef struct aliked_features {
  int batch;
  int capacity;             /* rows per image, whether used or not */
  int length;               /* of a descriptor */
  aliked_memory memory;     /* where the next three are: page-locked host memory, or the device */
  const float *keypoints;   /* [batch, capacity, 2] */
  const float *scores;      /* [batch, capacity], in [0, 1]; 0 in rows that are none */
  const float *descriptors; /* [batch, capacity, length] */
  const int *counts;        /* [batch], always in host memory; null where only the device knows */
} aliked_features;

/* The caller's own memory for features, of `aliked_capacity` rows per image or more. What is null
 * is not written. `counts` is host memory, and null with ALIKED_DEVICE; there each of the others
 * may also be page-locked memory, which has its rows once the stream has got there. */
typedef struct aliked_buffers {
  aliked_memory memory;
  int capacity; /* rows per image */
  float *keypoints, *scores, *descriptors;
  int *counts;
} aliked_buffers;

/* "1.1.0": of the library that runs, which may differ from the header's. */
ALIKED_API const char *aliked_version(void);

/* One sentence about the last error of this thread, "" before the first. */
ALIKED_API const char *aliked_last_error(void);

/* Load a weights file (see `python -m aliked.fused.pack_weights`), or one that is in memory. */
ALIKED_API aliked_status aliked_create(const char *weights_file, const aliked_options *options,
                                       aliked_extractor **extractor);
ALIKED_API aliked_status aliked_create_from_memory(const void *weights, size_t size,
                                                   const aliked_options *options,
                                                   aliked_extractor **extractor);
/* Waits for its work. Null is allowed. */
ALIKED_API void aliked_destroy(aliked_extractor *extractor);

ALIKED_API aliked_status aliked_get_info(aliked_extractor *extractor, aliked_info *info);

/* Rows per image that images of this size need: at most top_k or n_limit. */
ALIKED_API aliked_status aliked_capacity(aliked_extractor *extractor, int height, int width,
                                         int *capacity);

/* Features in page-locked memory of the library's, which the next call on this extractor may
 * overwrite. The first call of a size allocates; later ones do not. */
ALIKED_API aliked_status aliked_extract(aliked_extractor *extractor, const aliked_images *images,
                                        aliked_features *features);

/* The same into the caller's buffers. */
ALIKED_API aliked_status aliked_extract_into(aliked_extractor *extractor,
                                             const aliked_images *images,
                                             const aliked_buffers *buffers,
                                             aliked_features *features);

/* `aliked_extract` in two halves: the images may be changed once `aliked_submit` has returned,
 * unless they are page-locked or on the device; `aliked_wait` returns their features. */
ALIKED_API aliked_status aliked_submit(aliked_extractor *extractor, const aliked_images *images);
ALIKED_API aliked_status aliked_wait(aliked_extractor *extractor, aliked_features *features);

/* Features on the device, in order with the other work of the caller's stream (null: of the
 * extractor's own); nothing waits. They are in `buffers`, or where that is null in memory of the
 * library's, which the next call for this size overwrites. Images on the device must stay as they
 * are until the stream has used them. */
ALIKED_API aliked_status aliked_extract_async(aliked_extractor *extractor,
                                              const aliked_images *images,
                                              const aliked_buffers *buffers, aliked_stream stream,
                                              aliked_features *features);

/* The extractor's own stream, for callers that have none. */
ALIKED_API aliked_status aliked_get_stream(aliked_extractor *extractor, aliked_stream *stream);
/* Wait for a stream, null for the extractor's own. */
ALIKED_API aliked_status aliked_synchronize(aliked_extractor *extractor, aliked_stream stream);

/* Page-locked host memory, or device memory, for those who have no other means. */
ALIKED_API aliked_status aliked_allocate(aliked_extractor *extractor, aliked_memory memory,
                                         size_t size, void **pointer);
ALIKED_API aliked_status aliked_free(aliked_extractor *extractor, aliked_memory memory,
                                     void *pointer);

/* One image's descriptors to match. Rows whose score is 0 take no part; without scores all do. */
typedef struct aliked_descriptors {
  const float *descriptors; /* [count, length], unit length, aligned to 16 bytes */
  const float *scores;      /* [count], or null */
  aliked_memory memory;     /* of both */
  int count;
  int length; /* a multiple of 16 */
} aliked_descriptors;

/* In page-locked memory of the matcher's, which its next call overwrites. */
typedef struct aliked_matches {
  int count;                 /* rows of the first image */
  const int *index;          /* [count]: the row of the second image, or -1 */
  const float *similarities; /* [count]: cosine, 0 where there is no match */
} aliked_matches;

/* On the GPU with this number. */
ALIKED_API aliked_status aliked_create_matcher(int device, aliked_matcher **matcher);
ALIKED_API void aliked_destroy_matcher(aliked_matcher *matcher);

/* Pairs that are each other's most similar, with a cosine of at least `min_similarity`. */
ALIKED_API aliked_status aliked_match(aliked_matcher *matcher, const aliked_descriptors *first,
                                      const aliked_descriptors *second, float min_similarity,
                                      aliked_matches *matches);
/* The same in order with the work of the caller's stream (null: of the matcher's own); `matches`
 * has it once the stream has got there. Descriptors must be on the device. */
ALIKED_API aliked_status aliked_match_async(aliked_matcher *matcher,
                                            const aliked_descriptors *first,
                                            const aliked_descriptors *second,
                                            float min_similarity, aliked_stream stream,
                                            aliked_matches *matches);

#ifdef __cplusplus
}
#endif
#endif
