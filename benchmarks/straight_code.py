"""Time masks written into code against masks as data, for linear layers on one and on sixteen tokens; prints JSON.

    python benchmarks/straight_code.py [--sizes 64 128 256] [--sparsity 0.9]

Both kernels are C with AVX-512 intrinsics, compiled here with the C compiler. "code" names every input feature as a literal of straight
code, functions of about 3,000 statements each; "data" reads columns of two bytes, as runtimes/tvm/row_kernel.py does. Processor time, best of
many; inputs and weights lie in the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_HEAD = """
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
"""
_DATA = {
    1: """
__attribute__((noinline)) static void data(const float *v, const int16_t *c, const int *s, const float *x, float *y, int M) {
  for (int m = 0; m < M; m++) {
    __m512 a = _mm512_setzero_ps();
    for (int k = s[m]; k < s[m + 1]; k += 16) {
      int left = s[m + 1] - k;
      __mmask16 q = left >= 16 ? 0xffff : (1 << left) - 1;
      __m512i i = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(q, c + k));
      a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(q, v + k), _mm512_i32gather_ps(i, x, 4), a);
    }
    y[m] = _mm512_reduce_add_ps(a);
  }
}""",
    16: """
#define STEP(a, i) a = _mm512_fmadd_ps(_mm512_set1_ps(v[i]), _mm512_load_ps(x + 16 * c[i]), a)
__attribute__((noinline)) static void data(const float *v, const int16_t *c, const int *s, const float *x, float *y, int M) {
  for (int m = 0; m + 1 < M; m += 2) {
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, b0 = a0, b1 = a0;
    int p = s[m], q = s[m + 1], e = s[m + 2];
    for (; p + 2 <= s[m + 1] && q + 2 <= e; p += 2, q += 2) { STEP(a0, p); STEP(a1, p + 1); STEP(b0, q); STEP(b1, q + 1); }
    for (; p < s[m + 1]; p++) STEP(a0, p);
    for (; q < e; q++) STEP(b0, q);
    _mm512_store_ps(y + 16 * m, _mm512_add_ps(a0, a1));
    _mm512_store_ps(y + 16 * m + 16, _mm512_add_ps(b0, b1));
  }
}""",
}
_MAIN = """
int main(void) {
  int n = %(weights)d, size = %(size)d, turns = 1000000 / (n + 1) + 5;
  float *v = aligned_alloc(64, (n / 16 + 8) * 64), *x = aligned_alloc(64, size * 64), *y = aligned_alloc(64, size * 64);
  for (int i = 0; i < n; i++) v[i] = i %% 7;
  for (int i = 0; i < 16 * size; i++) x[i] = i %% 5;
  double code_time = 1e9, data_time = 1e9;
  for (int round = 0; round < 15; round++) {
    double begin = now();
    for (int i = 0; i < turns; i++) { code(v, x, y); __asm__ volatile("" ::: "memory"); }
    double took = (now() - begin) / turns;
    if (took < code_time) code_time = took;
    begin = now();
    for (int i = 0; i < turns; i++) { data(v, columns, starts, x, y, size); __asm__ volatile("" ::: "memory"); }
    took = (now() - begin) / turns;
    if (took < data_time) data_time = took;
  }
  printf("%%g %%g", 1e6 * code_time, 1e6 * data_time);
}
"""


def _straight(rows: list[list[int]], tokens: int) -> str:
    """The function ``code``: every column a literal, four sums per row."""
    functions, statements, at = [], [], 0
    for m, columns in enumerate(rows):
        if tokens == 1:
            statements.append(f"float a{m}[4] = {{0, 0, 0, 0}};")
            statements += [f"a{m}[{j % 4}] += v[{at + j}] * x[{c}];" for j, c in enumerate(columns)]
            statements.append(f"y[{m}] = a{m}[0] + a{m}[1] + a{m}[2] + a{m}[3];")
        else:
            zero = "_mm512_setzero_ps()"
            statements.append(f"__m512 a{m}[4] = {{{zero}, {zero}, {zero}, {zero}}};")
            statements += [
                f"a{m}[{j % 4}] = _mm512_fmadd_ps(_mm512_set1_ps(v[{at + j}]), _mm512_load_ps(x + {16 * c}), a{m}[{j % 4}]);"
                for j, c in enumerate(columns)
            ]
            pairs = [f"_mm512_add_ps(a{m}[{j}], a{m}[{j + 1}])" for j in (0, 2)]
            statements.append(f"_mm512_store_ps(y + {16 * m}, _mm512_add_ps({pairs[0]}, {pairs[1]}));")
        at += len(columns)
        if len(statements) > 3000 or m == len(rows) - 1:
            functions.append("\n".join(statements))
            statements = []
    given = "(const float *restrict v, const float *restrict x, float *restrict y)"
    parts = [f"__attribute__((noinline)) static void part{i}{given} {{\n{body}\n}}" for i, body in enumerate(functions)]
    calls = " ".join(f"part{i}(v, x, y);" for i in range(len(parts)))
    return "\n".join([*parts, f"static void code(const float *v, const float *x, float *y) {{ {calls} }}"])


def measure(size: int, sparsity: float, tokens: int) -> dict[str, Any]:
    """Microseconds of both kernels for a random mask of a ``size`` × ``size`` layer."""
    rows = [[c for c in range(size) if random.random() >= sparsity] for _ in range(size)]
    columns, starts = [c for row in rows for c in row], [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    arrays = f"static const int16_t columns[] = {{{','.join(map(str, [*columns, *[0] * 16]))}}};\n"
    arrays += f"static const int starts[] = {{{','.join(map(str, starts))}}};\n"
    main = _MAIN % {"weights": len(columns), "size": size}
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "straight.c", Path(folder) / "straight"
        source.write_text(_HEAD + _DATA[tokens] + arrays + _straight(rows, tokens) + main)
        compiler = [os.environ.get("CC", "cc"), "-O2", "-march=native", "-fno-tree-slp-vectorize"]
        subprocess.run([*compiler, "-o", str(program), str(source)], check=True)
        code, data = map(float, subprocess.run([program], check=True, capture_output=True, text=True).stdout.split())
    return {
        "size": size, "sparsity": sparsity, "tokens": tokens, "weights": len(columns),
        "code_microseconds": code, "data_microseconds": data, "code_over_data": round(code / data, 3),
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--sparsity", type=float, default=0.9)
    chosen = parser.parse_args()
    random.seed(0)
    results = [measure(size, chosen.sparsity, tokens) for size in chosen.sizes for tokens in (1, 16)]
    json.dump({"layers": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
