#!/usr/bin/env bash
# docs/gpu_figures.sh OUT [PART...]: takes the GPU figures of docs/benchmarks again, each as a JSON file in OUT.
#
# The parts, all of them by default: engines kernels training budgets. Run it from the repository's root, with the
# package installed, on a GPU that does nothing else. "engines" needs onnxruntime-gpu, and libmodcompile_ort.so of
# runtimes/native (-DMODCOMPILE_ORT=ON) in the root; SmolLM2 needs its package (see the Makefile), "budgets" also the
# texts that examples/texts.py makes, in texts/. TensorRT 8.6 has a script of its own,
# tests/runtimes/native/trt86_bench.py.
#
# Engines are built first, several at a time, for that is the host's work, and then timed one after the other. A second
# call with the same OUT finds those that are there. What fails is named, at once and at the end, and makes the
# exit status 1; the rest is done all the same.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?OUT, a folder as seen from the root}
mkdir -p "$out"
shift
parts=" ${*:-engines kernels training budgets} "

failed=()
fail() { # WHAT...
  echo "failed: $*" >&2
  failed+=("$*")
}

USUAL=mod,dense,oracle,pruned
ALL=$USUAL,other,masked
# runtime, name, function of examples.pretrained, input, variants, title
ENGINES=(
  "ort gpt8 gpt2_medium 8x1024 $ALL GPT-2 medium's shape, 8 x 1024, ONNX Runtime"
  "aoti gpt8 gpt2_medium 8x1024 $ALL GPT-2 medium's shape, 8 x 1024, AOTInductor"
  "ort gpt1 gpt2_medium 1x1024 $USUAL GPT-2 medium's shape, 1 x 1024, ONNX Runtime"
  "aoti gpt1 gpt2_medium 1x1024 $USUAL GPT-2 medium's shape, 1 x 1024, AOTInductor"
  "ort bert bert_large 8x512 $USUAL BERT-large's shape, 8 x 512, ONNX Runtime"
  "aoti bert bert_large 8x512 $USUAL BERT-large's shape, 8 x 512, AOTInductor"
  "ort smollm2 smollm2_unpadded text $USUAL SmolLM2-135M, 8 x 1024, ONNX Runtime"
  "aoti smollm2 smollm2_unpadded text $USUAL SmolLM2-135M, 8 x 1024, AOTInductor"
)

bench() { # RUNS OUTPUT SPEC...
  local runs=$1 output=$2 runtime=$3 name=$4 function=$5 input=$6 variants=$7 option=()
  shift 7
  [ "$runtime" = ort ] && option=(--option custom_ops=libmodcompile_ort.so)
  # torch.compile keeps nothing for a second process, so it is not built before it is timed.
  [ "$runs-$runtime-$name" = 50-aoti-gpt8 ] && variants+=,compile
  if [ "$input" = text ]; then input=(--input "$out/text.npz"); else input=(--shape "input_ids=$input"); fi
  modcompile bench "examples.pretrained:$function" --runtime "$runtime" --precision fp16 --device cuda \
    --gate straight-through "${input[@]}" "${option[@]}" --variants "$variants" --keep-going --runs "$runs" \
    --engines "$out/engines/$runtime-$name" --title "$*" -o "$output" --profile 12
}

engines() {
  local spec runtime name pid builds=()
  if ! python examples/pretrained.py --text texts/held-out/plays.txt --shape 8x1024 -o "$out/text.npz"; then
    fail "the tokens of texts/held-out/plays.txt, for SmolLM2"
  fi
  mkdir -p "$out/log"
  for spec in "${ENGINES[@]}"; do
    read -r runtime name _ <<< "$spec"
    # shellcheck disable=SC2086
    bench 1 "$out/log/$runtime-$name.json" $spec > "$out/log/$runtime-$name.txt" 2>&1 &
    builds+=("$! $runtime-$name")
  done
  for spec in "${builds[@]}"; do
    read -r pid name <<< "$spec"
    wait "$pid" || fail "the build of $name: see $out/log/$name.txt"
  done
  for spec in "${ENGINES[@]}"; do
    read -r runtime name _ <<< "$spec"
    # shellcheck disable=SC2086
    bench 50 "$out/$runtime-$name.json" $spec || fail "the figures of $runtime-$name"
  done
}

kernels() { python tests/runtimes/native/bench_kernels.py -o "$out/kernels.json" || fail "kernels"; }

training() {
  local batch
  for batch in 8 32; do
    python examples/bench_training.py --batch "$batch" --output "$out/training-$batch.json" || fail "training of $batch"
  done
}

# train FOLDER OPTION...: several processes share the cells; each takes what the others have not.
train() {
  local held_out=() workers=() name worker folder=$1
  shift
  for name in kernel plays python anarchism newsgroups; do held_out+=("$name=texts/held-out/$name.txt"); done
  for _ in 1 2 3 4; do
    python examples/train_budgets.py --train texts/train/{kernel,plays,python}.txt --held-out "${held_out[@]}" \
      --steps 300 --seeds 0 1 --device cuda --compile --folder "$out/$folder" "$@" &
    workers+=($!)
  done
  for worker in "${!workers[@]}"; do
    wait "${workers[worker]}" || fail "worker $((worker + 1)) of ${#workers[@]} of $out/$folder"
  done
}

budgets() {
  train budgets --budgets 0.9 0.8 0.7
  # What the search chooses for the lowest budget is behind when trained: these blocks were picked by hand.
  train budgets-structure --budgets 0.6 --structure {3..7}:0 {12..18}:0 25:0 26:0 {9..11}:3/4 21:7/8 23:25/32
}

for part in engines kernels training budgets; do
  if [[ $parts == *" $part "* ]]; then
    echo "== $part"
    "$part"
  fi
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
