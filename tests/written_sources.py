"""The same labelled images as every kind of source, for tests."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tars import png, write_tar

CLASSES = ["cat", "dog", "owl"]

KINDS = ("shards", "folder", "csv", "paths", "parquet", "arrow")


def write_source(kind: str, folder: Path, count: int = 13, first: int = 0) -> Path:
    """A source with the images `png(first)` ...; image i has the label i % 3. Returns what the user would name."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = range(first, first + count)
    if kind == "shards":
        for part, some in enumerate((ids[: count // 2], ids[count // 2 :])):
            files = [each for i in some for each in ((f"{i}.cls", b"%d" % (i % 3)), (f"{i}.png", png(i)))]
            write_tar(folder / f"{part}.tar", files)
        (folder / "classes.txt").write_text("\n".join(CLASSES))
        return folder
    if kind in ("folder", "csv", "paths"):
        for i in ids:
            path = folder / CLASSES[i % 3] / f"{i:03}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png(i))
        names = [f"{CLASSES[i % 3]}/{i:03}.png" for i in ids]
        if kind == "csv":
            rows = "".join(f"{name},{CLASSES[i % 3]},g\n" for i, name in zip(ids, names))
            (folder / "images.csv").write_text("path,label,group\n" + rows)
            return folder / "images.csv"
        if kind == "paths":
            table = pyarrow.table({"path": names, "label": [i % 3 for i in ids]})
            pyarrow.parquet.write_table(table, folder / "images.parquet")
            return folder / "images.parquet"
        return folder
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    table = pyarrow.table(
        {"image": [{"bytes": png(i), "path": None} for i in ids], "label": [i % 3 for i in ids], "other": list(ids)}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if kind == "parquet":
        for part in range(2):
            half = table.slice(0, count // 2) if part == 0 else table.slice(count // 2)
            pyarrow.parquet.write_table(half, folder / f"train-{part:05}-of-00002.parquet", row_group_size=4)
        return folder
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
