"""How the work on an activation of M rows (pixels of all pictures) and C channels is cut up.

A function of (M, C, dtype) alone: sums are taken in the same order on every GPU, so results can be reproduced.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TILE_BYTES = 4096  # two loads of 128 bits a thread of 4 warps; with twice as much some kernels spill registers
SCALAR_TILE = 512  # elements of a tile where they are read one by one, which takes registers for an address each
PROGRAMS = 1024  # about as many as an H100 keeps resident (132 multiprocessors, 8 programs of 64 registers a thread)
TILES = 4  # at least, in a program: less of its time goes into reading the channels' parameters


class Tiles(NamedTuple):
    """What one step of a kernel's loop works on."""

    rows: int  # a power of 2
    channels: int  # a power of 2, at least 8: the mask is written by bytes
    warps: int


class Grid(NamedTuple):
    """Which rows the programs of a kernel work on: each on a block of rows and Tiles.channels channels."""

    blocks: int
    block_rows: int  # a multiple of Tiles.rows; the last block may be shorter
    programs: int


def choose_tiles(m: int, c: int, dtype: torch.dtype) -> Tiles:
    """Tiles for an activation of m rows and c channels of `dtype`.

    Chosen by registers and vector width (bench/registers.py); no GPU has been measured yet.
    """
    channels = min(64, max(8, _next_power_of_2(c)))
    elements = SCALAR_TILE if c % 4 else TILE_BYTES // dtype.itemsize
    return Tiles(rows=elements // channels, channels=channels, warps=4)


def make_grid(m: int, c: int, tiles: Tiles) -> Grid:
    """Blocks of rows such that the programs fill a large GPU once and none has only a tile or two."""
    columns = -(-c // tiles.channels)
    blocks = max(1, min(PROGRAMS // columns, m // (tiles.rows * TILES)))
    block_rows = max(1, -(-m // (blocks * tiles.rows))) * tiles.rows
    blocks = max(1, -(-m // block_rows))
    return Grid(blocks, block_rows, blocks * columns)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
