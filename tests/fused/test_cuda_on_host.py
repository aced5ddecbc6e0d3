"""What the CPU stand-in for a GPU says of kernels: warps agree with PyTorch, races show."""

import pytest
import torch

from tests.helpers import cuda_on_host

SOURCE = """
extern "C" __global__ void product(const u32 *a, const u32 *b, float *d) {
  __shared__ __align__(16) u32 left[16 * 8], right[16 * 4];  // [16, 16] and [16, 8] halves
  for (int i = threadIdx.x; i < 128; i += 32) left[i] = a[i];
  for (int i = threadIdx.x; i < 64; i += 32) right[i] = b[i];
  __syncthreads();
  u32 rows[4], columns[4];
  load_matrices(rows, left + threadIdx.x % 16 * 8 + threadIdx.x / 16 * 4);
  load_transposed(columns, right + threadIdx.x % 16 * 4);
  const u32 inner[2] = {columns[0], columns[1]};
  float sums[4] = {};
  product16(sums, rows, inner);
  for (int i = 0; i < 4; ++i)
    d[(threadIdx.x / 4 + i / 2 * 8) * 8 + threadIdx.x % 4 * 2 + i % 2] = sums[i];
}
extern "C" __global__ void reverse(int *values, int barrier) {
  __shared__ int copy[256];
  copy[threadIdx.x] = values[threadIdx.x];
  if (barrier) __syncthreads();
  values[threadIdx.x] = copy[255 - threadIdx.x];
}
extern "C" __global__ void warp_sum(int *values) {
  int sum = values[threadIdx.x];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
  values[threadIdx.x] = sum;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_on_host.build(SOURCE, tmp_path_factory.mktemp("kernels"))


def test_a_matrix_product_is_that_of_pytorch(library):
    a, b, d = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.zeros(16, 8)
    cuda_on_host.launch(library, "product", (1, 1, 1), (32, 1, 1), [a, b, d])
    torch.testing.assert_close(d, a.float() @ b.float())


@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_shows(library, barrier):
    values = torch.arange(256, dtype=torch.int32)
    cuda_on_host.launch(library, "reverse", (1, 1, 1), (256, 1, 1), [values, int(barrier)])
    right = torch.equal(values, torch.arange(256, dtype=torch.int32).flip(0))
    assert right == barrier


def test_lanes_exchange_within_their_warp(library):
    values = torch.arange(64, dtype=torch.int32)
    cuda_on_host.launch(library, "warp_sum", (1, 1, 1), (64, 1, 1), [values])
    assert values.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
