import mlx.core as mx
import pytest

from mlx_ppo.errors import ModelError
from mlx_ppo.models.load import computing_with
from mlx_ppo.runtime.device_errors import device_failure, needing_gradients

METAL = "[METAL] Command buffer execution failed: "
TEXTS = {
    METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).": (
        "out of memory",
        "budget_gb",
    ),
    METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).": ("longer", "micro_batch"),
    METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).": (
        "display",
        "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 or MLX_MAX_OPS_PER_BUFFER",
    ),
    METAL + "Discarded (victim of GPU error/recovery).": ("work failed", "micro_batch"),
    "[metal::malloc] Resource limit (499000) exceeded.": ("more arrays", "budget_gb"),
    "[malloc] Unable to allocate 17179869184 bytes.": ("allocate", "budget_gb"),
    "cudaMallocAsync(&data, size, stream) failed: out of memory": ("out of memory", "budget_gb"),
    "cuGraphLaunch(graph, stream) failed: an illegal memory access": ("work failed", "driver"),
}


@pytest.mark.parametrize(("text", "words"), TEXTS.items())
def test_what_a_gpu_says_is_recognised(text: str, words: tuple[str, str]) -> None:
    failure = device_failure(RuntimeError(text))
    assert failure is not None
    assert words[0] in failure.cause and words[1] in failure.remedy and text[:60] in failure.cause
    assert "\n" not in failure.cause + failure.remedy


@pytest.mark.parametrize(
    "text", ["", "shapes (2,3) and (4,) cannot be broadcast", "[load_safetensors] failed: no such file"]
)
def test_other_errors_are_not(text: str) -> None:
    assert device_failure(RuntimeError(text)) is None
    assert device_failure(KeyError(next(iter(TEXTS)))) is None


def test_a_model_is_not_blamed_for_its_device() -> None:
    with pytest.raises(RuntimeError, match="Insufficient"), computing_with("x"):
        raise RuntimeError(next(iter(TEXTS)))
    with pytest.raises(ModelError, match="cannot compute"), computing_with("x"):
        raise RuntimeError("shapes differ")


def test_an_operation_without_a_gradient_is_one_line() -> None:
    """Metal's kernels that an architecture of mlx-lm brings along have none; here one of mlx's that has none either."""
    with pytest.raises(ModelError, match=r"not trained: one of its operations \(Inverse\)"), needing_gradients():
        mx.grad(lambda x: mx.linalg.inv(x, stream=mx.cpu).sum())(mx.eye(2))
    with pytest.raises(ValueError, match="shapes differ"), needing_gradients():
        raise ValueError("shapes differ")
