"""The mask of causal attention against its definition, entry by entry."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.layers import attention_mask

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_window(past: int, window: int) -> None:
    mask = attention_mask(None, 4, window, CPU, past=past)
    assert mask is not None or (past == 0 and window >= 4)
    if mask is None:
        return
    assert mask.shape == (1, 1, 4, past + 4)
    for query in range(4):
        for key in range(past + 4):
            distance = past + query - key
            assert mask[0, 0, query, key].item() == (0 <= distance < window)


@pytest.mark.parametrize("window", [None, 2])
def test_documents(window: int | None) -> None:
    mask = attention_mask(DOCUMENTS, 6, window, CPU)
    assert mask is not None
    assert mask.shape == (2, 1, 6, 6)
    for row, documents in enumerate(DOCUMENTS.tolist()):
        for query in range(6):
            for key in range(6):
                near = 0 <= query - key < (window or 6)
                assert mask[row, 0, query, key].item() == (near and documents[query] == documents[key])


def test_none_where_causality_says_it() -> None:
    assert attention_mask(None, 6, None, CPU) is None
    assert attention_mask(None, 6, 6, CPU) is None
    assert attention_mask(None, 1, None, CPU, past=5) is None
    assert attention_mask(None, 1, 6, CPU, past=5) is None
    assert attention_mask(None, 2, None, CPU, past=5) is not None
    assert attention_mask(None, 1, 5, CPU, past=5) is not None
