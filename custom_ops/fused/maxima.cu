// Non-maximum suppression in one pass: a tile with its halo stays in shared memory through all
// rounds. Any number of threads per block gives the same result.
//
// Defined before this text: RADIUS, BINS, BIN_SHIFT, LOWEST_BIN, TALLY.

constexpr int INNER = 32;            // pixels of a tile that are this block's own
constexpr int HALO = 5 * RADIUS;     // five windows follow each other: one, and two per round
constexpr int SIDE = INNER + 2 * HALO;
constexpr int AREA = SIDE * SIDE;

__device__ int nearest(int at) { return at < 0 ? 0 : at >= SIDE ? SIDE - 1 : at; }

// Largest of the five values down the column of place i.
template <typename T> __device__ T down(const T *values, int i) {
  const int row = i / SIDE, column = i % SIDE;
  T best = values[i];
  for (int step = -RADIUS; step <= RADIUS; ++step) {
    const T other = values[nearest(row + step) * SIDE + column];
    best = other > best ? other : best;
  }
  return best;
}

// Largest of the five values along the row of place i.
template <typename T> __device__ T along(const T *values, int i) {
  const int row = i / SIDE, column = i % SIDE;
  T best = values[i];
  for (int step = -RADIUS; step <= RADIUS; ++step) {
    const T other = values[row * SIDE + nearest(column + step)];
    best = other > best ? other : best;
  }
  return best;
}

#define EACH_PLACE(i) for (int i = threadIdx.x; i < AREA; i += blockDim.x)

extern "C" __global__ void find_maxima(const float *scores, long long *keys, int *tally,
                                       int height, int width, int across) {
  __shared__ float values[AREA], rest[AREA], columns[AREA];
  __shared__ unsigned char maxima[AREA], near[AREA], beside[AREA];
  __shared__ int found[INNER * INNER], count, first;
  const int top = blockIdx.x / across * INNER - HALO, left = blockIdx.x % across * INNER - HALO;
  const size_t capacity = size_t(height - 2 * RADIUS) * (width - 2 * RADIUS);
  scores += size_t(blockIdx.y) * height * width;
  keys += blockIdx.y * capacity;
  tally += size_t(blockIdx.y) * TALLY;

  if (threadIdx.x == 0) count = 0;
  EACH_PLACE(i) {
    const int y = top + i / SIDE, x = left + i % SIDE;
    const bool exists = y >= 0 && y < height && x >= 0 && x < width;
    values[i] = exists ? scores[y * width + x] : -1.f;  // below every score
  }
  __syncthreads();
  EACH_PLACE(i) columns[i] = down(values, i);
  __syncthreads();
  EACH_PLACE(i) maxima[i] = values[i] >= 0 && values[i] == along(columns, i);
  __syncthreads();
  // Two more rounds recover maxima that were only suppressed by suppressed neighbours.
  for (int round = 0; round < 2; ++round) {
    EACH_PLACE(i) beside[i] = down(maxima, i);
    __syncthreads();
    EACH_PLACE(i) {
      near[i] = along(beside, i);
      rest[i] = near[i] && values[i] >= 0 ? 0.f : values[i];
    }
    __syncthreads();
    EACH_PLACE(i) columns[i] = down(rest, i);
    __syncthreads();
    EACH_PLACE(i) {
      if (!near[i] && values[i] >= 0 && rest[i] == along(columns, i)) maxima[i] = 1;
    }
    __syncthreads();
  }

  for (int i = threadIdx.x; i < INNER * INNER; i += blockDim.x) {
    const int row = i / INNER + HALO, column = i % INNER + HALO;
    const int y = top + row, x = left + column, place = row * SIDE + column;
    const bool inside =
        y >= RADIUS && y < height - RADIUS && x >= RADIUS && x < width - RADIUS;
    if (inside && maxima[place] && values[place] > 0) found[atomicAdd(&count, 1)] = place;
  }
  __syncthreads();
  if (threadIdx.x == 0) first = atomicAdd(tally + BINS, count);
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int y = top + found[i] / SIDE, x = left + found[i] % SIDE;
    const int bits = __float_as_int(values[found[i]]);
    keys[first + i] = ((long long)bits << 32) | (0xFFFFFFFFu - unsigned(y * width + x));
    const int bin = (bits >> BIN_SHIFT) - LOWEST_BIN;
    // Most maxima of a photograph are below all bins: counting them in one place would queue up.
    if (bin > 0) atomicAdd(tally + bin, 1);
  }
}
