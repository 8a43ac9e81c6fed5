#!/usr/bin/env bash
# Every check of the kernels on a machine with NVIDIA GPUs, side by side, within a time limit.
#
#   scripts/gpu_check_all.sh FOLDER [SECONDS [SHARDS [PARTS]]]
#   python scripts/gpu_check_record.py FOLDER --out benchmarks/gpu_check.json
#
# Kernel cases against float64 and under both sanitizers, in SHARDS processes; beside them the default
# model on both back-ends, doctor on this tree, in PARTS processes, and with --quick on two whose
# kernels are wrong, and the launches of a decode step. TEXT: a file for the model's windows; else the
# package's sample. Kernels of a process are compiled into a folder of its own, since MLX's processes
# cannot share one. The machine's GPUs take turns.
set -u
CASE_SECONDS=60 # the longest case, which is not begun later
cd "$(dirname "$0")/.."
folder=$(realpath "${1:?a folder for the records}") limit=${2:-1800} shards=${3:-$(nproc)} parts=${4:-6}
compiled=$folder/compiled gpus=$(nvidia-smi -L 2>/dev/null | grep -c .)
export TURBOKV_SELFCHECK=0
mkdir -p "$compiled"

left() { echo $((limit - SECONDS)); }

# run NAME COMMAND...: the command's output is in NAME.log, its exit status in NAME.rc
run() {
  local name=$1 ended
  shift
  [ -e "$folder/$name.json" ] && return
  [ "$(left)" -lt 20 ] && return 1
  timeout "$(left)" "$@" --"$as" "$folder/$name.json" >"$folder/$name.log" 2>&1
  ended=$?
  echo $ended >"$folder/$name.rc"
  echo "$name: exit status $ended after $SECONDS s"
}

# cases NAME COMMAND...: run the cases that no record NAME.*.json has
cases() {
  local as=out name=$1 have=("$folder/$1".*.json)
  shift
  [ -e "${have[0]}" ] || have=()
  [ ${#have[@]} -gt 0 ] && grep -q '"not_run": \[\]' "${have[-1]}" && return
  [ "$(left)" -lt $((CASE_SECONDS + 20)) ] && return 1
  name=$name.${#have[@]}
  for _ in 1 2; do
    [ "$(left)" -lt $((CASE_SECONDS + 20)) ] && return 1
    run "$name" "$@" --seconds $(($(left) - CASE_SECONDS)) ${have[@]+--without "${have[@]}"}
    # a sanitizer that lost track of a launch says nothing of the cases: once more
    grep -qs "Internal Sanitizer Error" "$folder/$name.log" || return 0
    mv "$folder/$name.log" "$folder/$name.lost"
    mv "$folder/$name.json" "$folder/$name.lost.record"
  done
}

shard() {
  local check="python3 scripts/gpu_check.py --shard $1/$shards" tool
  export MLX_PTX_CACHE_DIR=$compiled/$1
  [ "$gpus" -gt 1 ] && export CUDA_VISIBLE_DEVICES=$(($1 % gpus))
  cases "cases$1" $check || return
  for tool in memcheck racecheck; do
    cases "$tool$1" compute-sanitizer --tool $tool $check || return
  done
}

# part I: doctor's every PARTS-th variant of this tree
part() {
  local as=json
  export MLX_PTX_CACHE_DIR=$compiled/part$1
  run "doctor0.$1" python3 scripts/doctor_part.py "$1/$parts"
}

# doctor NUMBER FILE OLD NEW WHAT: of a tree in whose FILE the text OLD is NEW
doctor() {
  local as=json tree=$compiled/tree$1
  export MLX_PTX_CACHE_DIR=$compiled/doctor$1
  rm -rf "$tree"
  mkdir "$tree"
  cp -r metal mlx_turbokv "$tree"
  python3 - "$tree/metal/$2" "$3" "$4" <<'END' || return
import sys
from pathlib import Path

path, old, new = Path(sys.argv[1]), *sys.argv[2:]
text = path.read_text()
assert text.count(old) == 1, f"{path} has {old} {text.count(old)} times"
path.write_text(text.replace(old, new))
END
  echo "$5" >"$folder/doctor$1.txt"
  export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
  (cd "$tree" && run "doctor$1" python3 -m mlx_turbokv doctor --quick --no-times)
}

model() {
  local as=out
  export MLX_PTX_CACHE_DIR=$compiled/model
  run model python3 scripts/gpu_check.py --no-kernels --windows 16 ${TEXT:+--text "$TEXT"}
}

launches() {
  local as=out
  export MLX_PTX_CACHE_DIR=$compiled/launches
  run launches python3 scripts/ncu.py launches
}

model &
launches &
for i in $(seq 0 $((parts - 1))); do
  part "$i" &
done
doctor 1 pack_quantize.h "scale_bits(unbiased_scale(energy, levels_dot))" \
  "scale_bits(1.01f * unbiased_scale(energy, levels_dot))" \
  "pack.metal: scales 1 % too large, in pack_quantize.h" &
doctor 2 merge.metal "x[j] += factor * " "x[j] += 1.01f * factor * " \
  "merge.metal: a sum 1 % too large" &
for i in $(seq 0 $((shards - 1))); do
  shard "$i" &
done
wait
