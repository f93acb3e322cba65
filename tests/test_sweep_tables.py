"""The tables of v3 beside its peers: from the records, the best in bold, the lowest named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import record, sweep_tables


def row(name: str, tflops: float, seqlen: int = 512, mask: str = "full") -> dict[str, Any]:
    return {"head_dim": 64, "mask": mask, "seqlen": seqlen, "competitor": name, "tflops": tflops}


def test_the_best_of_a_shape_is_bold_and_the_lowest_is_named(tmp_path: Path) -> None:
    rows = [row("v3", 200.0), row("fa3", 100.0), row("sdpa-cudnn", 160.0), row("v2", 900.0),
            row("v3", 80.0, 2048), row("fa3", 100.0, 2048),
            row("v3", 50.0, 512, "causal"), row("fa3", 40.0, 512, "causal"),
            row("v3", 70.0, 8192)]  # fmt: skip
    record.write(tmp_path / "forward_bfloat16.json", {"rows": rows})
    text = sweep_tables.beside(tmp_path, "forward_bfloat16")
    assert "| 64 | full | **200** (FA3 100, cuDNN 160) | 80 (FA3 **100**) |" in text
    assert "| 64 | causal | **50** (FA3 40) | – |" in text
    assert "1.077 (1.08 at d = 64), lowest 0.800 (d = 64, full, S = 2048); 1 of 3 shapes" in text
    assert "900" not in text
    assert "8192" not in text  # no peer beside: no comparison
    assert sweep_tables.beside(tmp_path, "backward_bfloat16") == sweep_tables.NOTHING


def test_fp8_has_a_table_for_each_layout_of_v(tmp_path: Path) -> None:
    name, peer = "forward_float8_e4m3fn", row("fa3", 338.0)
    record.write(tmp_path / f"{name}.json", {"rows": [row("v3", 676.0), peer]})
    assert "| 64 | full | **676** (FA3 338) |" in sweep_tables.beside(tmp_path, name)
    assert sweep_tables.beside(tmp_path, name, "v3-keys") == sweep_tables.NOTHING
    rows = [row("v3", 676.0), row("v3-keys", 169.0), peer]
    record.write(tmp_path / f"{name}.json", {"rows": rows})
    assert "| 64 | full | 169 (FA3 **338**) |" in sweep_tables.beside(tmp_path, name, "v3-keys")
