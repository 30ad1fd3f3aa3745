#!/usr/bin/env bash
# All GPU tests and benchmarks, in at most 9 minutes, on a machine without a network.
# bench/README.md, section "On a GPU machine", says what it needs and what it leaves.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

LIMIT=540
STEPS="tests train roofline rounds peers"

usage() {
    cat <<END
usage: bench/gpu.sh [--device cuda|cpu] [--pair NAME] [--config FILE] [--out DIR]
                    [--only "STEP ..."] [--quick]

Steps: $STEPS (train is left out where the pair is there).
--quick takes the smallest sizes: it shows that everything runs, and measures nothing.
END
}

device=cuda pair=pythia-shaped config=config.yaml out=bench/results only=$STEPS quick=
while (($#)); do
    case $1 in
        --device) device=${2?} && shift ;;
        --pair) pair=${2?} && shift ;;
        --config) config=${2?} && shift ;;
        --out) out=${2?} && shift ;;
        --only) only=${2?} && shift ;;
        --quick) quick=yes ;;
        --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done
for name in $only; do
    [[ " $STEPS " == *" $name "* ]] || { usage >&2 && exit 2; }
done

# Sizes that fit the time on an H200: 97 s, 136 s and 28 s.
declare -A sizes=(
    [roofline]="--tokens 64 --runs 10"
    [peers]="--context 1000 --prompts 4 --runs 2 --tokens 128
        --methods ar linear dynatree generate assistant"
    [rounds]="--prompts 2 --runs 2 --contexts 128 1000 --budgets 31 63"
)
if [[ $quick ]]; then
    sizes=(
        [roofline]="--tokens 4 --runs 2 --context 16 --repeats 1 --copy-mib 16"
        [peers]="--context 16 --prompts 1 --runs 1 --tokens 4"
        [rounds]="--prompts 1 --runs 1 --tokens 4 --contexts 16 --budgets 16"
    )
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# The wheels are for the GPU machine's Python; another one has the packages, or could not use them.
if ! python3 -c 'import pydantic' 2>"$work/import" && compgen -G '.whl/*.whl' >"$work/wheels"; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$work/site" .whl/*.whl || exit
    PYTHONPATH="$work/site:$PYTHONPATH"
fi

# Runs one step: its name, the seconds that it may take, its command. What it printed goes to
# $work/NAME.log, and its outcome to $work/NAME.outcome.
step() {
    local name=$1 seconds=$2 begin=$SECONDS status left=$((LIMIT - SECONDS))
    shift 2
    ((seconds = seconds < left ? seconds : left))
    if ((seconds < 10)); then
        echo "not begun: no time left" >"$work/$name.outcome"
        return 0
    fi
    echo "== $name, at most $seconds s"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$work/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) status=ok ;;
        124 | 137) status="stopped, time over" ;;
        *) status="failed with status $status" ;;
    esac
    echo "$status, $((SECONDS - begin)) s" >"$work/$name.outcome"
    # As they come, so that a run that is cut off leaves what it has.
    [[ -z ${OUT-} ]] || find "$out" -type f -newer "$work/begin" -exec cp {} "$OUT" \;
}

train() {
    local folder=results/pairs/$pair recipe
    [[ " $only " == *" train "* ]] && [[ ! -e $folder/training.json ]] || return 0
    recipe=$(python3 - "$config" "$pair" <<'END'
import sys

from dynatree.config import load_config
from dynatree.schema import canonical

models = load_config(sys.argv[1]).pairs[sys.argv[2]]
if models.recipe is not None:
    print(canonical(models.recipe.model_dump(mode="json")))
END
    ) || return
    # Another pair is loaded from where the configuration says.
    [[ -z $recipe ]] ||
        step train 200 python3 scripts/train_pair.py --recipe "$recipe" --device "$device" \
            --out "$folder"
}

tests() {
    local options=(-q)
    [[ $device == cuda ]] && options+=(-m gpu)
    # Most of the time goes into compiling, which several processes do at once.
    python3 -c 'import xdist' 2>"$work/import" && options+=(-n "$(($(nproc) / 4))")
    [[ " $only " != *" tests "* ]] || TORCHINDUCTOR_COMPILE_THREADS=4 step tests 200 \
        python3 -m pytest tests/test_gpu.py tests/test_cuda_kernels.py "${options[@]}"
}

touch "$work/begin"
# Neither is timed, so they share the device.
tests >/dev/null &
train
wait
[[ ! -e $work/tests.log ]] || tail -n 40 "$work/tests.log"
# In one process, which loads and compiles once; the longest comes last.
commands=()
for name in roofline rounds peers; do
    [[ " $only " != *" $name "* ]] || commands+=("$name ${sizes[$name]}")
done
((${#commands[@]} == 0)) || step benchmarks 480 python3 bench/suite.py --config "$config" \
    --pair "$pair" --device "$device" --out "$out" "${commands[@]}"

{
    echo "bench/gpu.sh: $pair on $device, $SECONDS s"
    for name in tests train benchmarks; do
        [[ -e $work/$name.outcome ]] && echo "$name: $(<"$work/$name.outcome")"
    done
    [[ ! -e $work/benchmarks.log ]] || grep '^== .*: ' "$work/benchmarks.log"
} | tee "$work/summary"
if [[ -n ${OUT-} ]]; then
    cat "$work"/*.log "$work/summary" >"$OUT/gpu.log"
fi
! grep -q -v '^ok' "$work"/*.outcome
