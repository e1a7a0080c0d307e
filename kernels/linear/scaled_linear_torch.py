"""The provider of scaled_linear that torch brings: cuBLASLt or CUTLASS on GPUs, oneDNN on CPUs.

float8 goes to torch._scaled_mm on GPUs and to a float32 product on CPUs, int8 to torch._int_mm, with the scales after
it: on CPUs torch._scaled_mm takes 1.5 times as long. What is refused is what torch refuses
(aten/src/ATen/native/cuda/ScaledBlas.cpp and Blas.cpp, the same in torch 2.11 to 2.13) and what cuBLASLt asks of block
scales: https://docs.nvidia.com/cuda/cublas/#element-1d-and-128x128-2d-block-scaling-for-fp8-data-types.
Its rows are not batch invariant in bits for float8: the library chooses its tiles by T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scaled_linear import gpu_before, lacks_float8, scaled_linear, scales_blocks


def _refuses(
    x_TK: Tensor, x_scale_TG: Tensor, w_NK: Tensor, w_scale: Tensor, dtype: torch.dtype, bias_N: Tensor | None
) -> str | None:
    T, (N, K), cuda = x_TK.shape[0], w_NK.shape, x_TK.device.type == "cuda"
    if x_TK.stride() != (K, 1) or w_NK.stride() != (K, 1) or not w_scale.is_contiguous():
        return f"x, w and w_scale must be contiguous, got strides {x_TK.stride()}, {w_NK.stride()}, {w_scale.stride()}"
    if not N or not K:
        return f"the weight is empty, ({N}, {K})"
    blocks = scales_blocks(w_scale, N, K)
    if x_TK.dtype == torch.int8:
        if blocks or x_scale_TG.shape[1] > 1:
            return "int8 is served with one scale a row of x and of w"
        if cuda and not (N % 8 == 0 and K % 8 == 0 and isinstance(T, int) and T > 16):  # symbolic T may be less
            return f"torch._int_mm wants more than 16 rows, and N and K in multiples of 8, got {T}, {N}, {K}"
        # torch 2.13 adds the products of one column to uninitialized memory (oneDNN on x86).
        return "torch._int_mm is wrong on CPUs for K = 1" if K == 1 and not cuda else None
    if blocks != (x_scale_TG.shape[1] > 1) or (blocks and not cuda):
        return "float8 is served with one scale a row of x and of w, on GPUs also with blocks on both sides"
    if not cuda:
        return None
    if lacks_float8(x_TK):
        return "float8 needs compute capability 8.9"
    if N % 16 or K % 16:
        return f"torch._scaled_mm wants N and K in multiples of 16, got {N}, {K}"
    if dtype != torch.bfloat16 or (bias_N is not None and bias_N.dtype != torch.bfloat16):
        return f"the result and the bias must be bfloat16, got {dtype}{'' if bias_N is None else f', {bias_N.dtype}'}"
    if blocks and (gpu_before(9) or not gpu_before(10) or K % 512 or N % 128):
        return f"block scales need Hopper, K in multiples of 512 (four blocks) and N of 128, got {K}, {N}"
    return None


@scaled_linear.provider("torch_scaled_mm", devices=("cuda", "cpu"), refuses=_refuses)
def scaled_linear_torch(
    x_TK: Tensor, x_scale_TG: Tensor, w_NK: Tensor, w_scale: Tensor, dtype: torch.dtype, bias_N: Tensor | None = None
) -> Tensor:
    T, N = x_TK.shape[0], w_NK.shape[0]
    if not T:
        return torch.empty(0, N, dtype=dtype, device=x_TK.device)
    if x_TK.dtype == torch.int8 or not x_TK.is_cuda:
        product_TN = torch._int_mm(x_TK, w_NK.T).float() if x_TK.dtype == torch.int8 else x_TK.float() @ w_NK.float().T
        out_TN = product_TN.mul_(x_scale_TG).mul_(w_scale.T)
        return (out_TN if bias_N is None else out_TN.add_(bias_N)).to(dtype)
    if scales_blocks(w_scale, N, w_NK.shape[1]):
        x_scale = x_scale_TG.T.contiguous().T  # cuBLASLt reads a group's scales of all rows side by side
    else:
        x_scale, w_scale = x_scale_TG.contiguous(), w_scale.expand(N, 1).contiguous()
    return torch._scaled_mm(x_TK, w_NK.T, x_scale, w_scale.T, bias=bias_N, out_dtype=dtype)
