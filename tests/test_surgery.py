import numpy as np
import torch

from flap_stream.arithmetic.surgery import baseline_shift, removed_indices, select_columns


def test_removed_is_the_complement_of_kept() -> None:
    assert removed_indices(np.array([0, 3]), 5).tolist() == [1, 2, 4]
    assert removed_indices(np.array([], dtype=np.int64), 2).tolist() == [0, 1]


def test_columns_are_selected_bit_for_bit() -> None:
    rows = torch.tensor([[1.0, float("nan"), -0.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    kept = select_columns(rows, torch.tensor([1, 2]))
    assert torch.equal(kept.view(torch.int16), rows[:, 1:].contiguous().view(torch.int16))


def test_shift_is_what_removed_columns_give_on_average() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 9), torch.randn(50, 9)
    removed = torch.tensor([2, 5, 8])
    shift = baseline_shift(weight, removed, inputs.double().mean(dim=0))
    whole = (inputs[:, removed].double() @ weight[:, removed].double().T).mean(dim=0)
    assert shift.dtype == torch.float64
    torch.testing.assert_close(shift, whole)
