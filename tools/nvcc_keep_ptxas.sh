#!/bin/sh
# nvcc_keep_ptxas.sh NVCC ARGUMENTS...: runs nvcc and keeps what `-Xptxas -v` says of registers and
# spills beside the object, as OBJECT.ptxas, for tools/ptxas_report.py; the rest is shown.
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
