#!/usr/bin/env bash
# rosettasciio reads other numbers than are in an MRC file of signed bytes, or of big-endian numbers.
#
# Seen with: rosettasciio 0.15.0, mrcfile 1.5.4, ncempy 1.16, Python 3.11, 2026-11-28.
# Behaviour: mode 0 of the format MRC2014 is a signed byte, and mrcfile and ncempy read it so.
# rosettasciio reads it as unsigned: -5 becomes 251, so the negative pixels become the brightest.
# With `endianness=">"`, which is documented, rosettasciio reads the header of a big-endian file in
# that order, and the pixels in the other: 1 becomes 256. There is no warning in either case. The
# other modes of little-endian files are read right.
# For ALRC: such pixels are outliers in every image, and every loss of them is high. So
# examples/partial_stem reads MRC files by mrcfile.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.2.6 rosettasciio==0.15.0 mrcfile==1.5.4 ncempy==1.16
cd "$folder"
venv/bin/python - > found 2> log <<'PYTHON' || { cat log; exit 1; }
import mrcfile
import numpy as np
from ncempy.io import mrc
from rsciio.mrc import file_reader

ORDERS = {"little": "<", "big": ">"}


def show(values, order):
    with mrcfile.new("image.mrc", overwrite=True) as file:
        file.set_data(values.astype(values.dtype.newbyteorder(ORDERS[order])))
    print(f"{values.dtype.name}, {order}-endian: {values.ravel().tolist()}")
    print("  mrcfile     ", mrcfile.read("image.mrc").ravel().tolist())
    if order == "little":  # ncempy refuses big-endian files
        print("  ncempy      ", mrc.mrcReader("image.mrc")["data"].ravel().tolist())
    (signal,) = file_reader("image.mrc", endianness=ORDERS[order])
    print("  rosettasciio", signal["data"].ravel().tolist())


show(np.array([[-128, -5], [0, 127]], np.int8), "little")
show(np.array([[-128, -5], [0, 127]], np.int16), "little")
show(np.array([[-128, -5], [1, 300]], np.int16), "big")
show(np.array([[0.5, 1.0], [2.0, 3.0]], np.float32), "big")
PYTHON
cat > expected <<'EXPECTED'
int8, little-endian: [-128, -5, 0, 127]
  mrcfile      [-128, -5, 0, 127]
  ncempy       [-128, -5, 0, 127]
  rosettasciio [128, 251, 0, 127]
int16, little-endian: [-128, -5, 0, 127]
  mrcfile      [-128, -5, 0, 127]
  ncempy       [-128, -5, 0, 127]
  rosettasciio [-128, -5, 0, 127]
int16, big-endian: [-128, -5, 1, 300]
  mrcfile      [-128, -5, 1, 300]
  rosettasciio [-32513, -1025, 256, 11265]
float32, big-endian: [0.5, 1.0, 2.0, 3.0]
  mrcfile      [0.5, 1.0, 2.0, 3.0]
  rosettasciio [8.828180325246348e-44, 4.600602988224807e-41, 8.96831017167883e-44, 2.304855714121459e-41]
EXPECTED
diff expected found && echo "as described"
