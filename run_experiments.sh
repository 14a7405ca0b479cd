#!/usr/bin/env bash
# Every table and figure of the README: runs what is missing, then writes Markdown, CSV, LaTeX and PNG.
#
#     bash run_experiments.sh                                                       # the demo, no download
#     DATA=chexpert DATA_DIR=/data/CheXpert ENCODER=biovil bash run_experiments.sh  # the real thing
#     SEEDS="27 28" ONLY="main forgetting" OUT=/tmp/mine bash run_experiments.sh
#
# Finished runs are skipped, interrupted ones resume; the first error stops everything and shows its command.
set -euo pipefail
cd "$(dirname "$0")"

DATA=${DATA:-demo}              # data set, as in `python retune.py --help`
DATA_DIR=${DATA_DIR:-}          # its folder
ENCODER=${ENCODER:-tiny}        # frozen encoder
ENCODER_DIR=${ENCODER_DIR:-}    # its files as published, where there is no network
SEEDS=${SEEDS:-27 28 29}
ORDERS=${ORDERS:-1 2 3 4 5}     # seeds of the random class orders
OUT=${OUT:-results}             # results go to $OUT/$DATA-$ENCODER, embeddings to $OUT/cache
OPTIONS=${OPTIONS:-}            # more options of retune.py, such as "--view frontal --contiguous"
ONLY=${ONLY:-main forgetting adaptors prompts order cost calibration figures}

[[ $DATA == demo ]] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # its matrices are too small to divide
RESULTS=$OUT/$DATA-$(basename "$ENCODER")
RETUNE=(python retune.py --data "$DATA" ${DATA_DIR:+--data-dir "$DATA_DIR"} --encoder "$ENCODER"
    ${ENCODER_DIR:+--encoder-dir "$ENCODER_DIR"} --cache-dir "$OUT/cache" --no-figures $OPTIONS --seed $SEEDS)
DONE=$RESULTS/runs/finished.txt

# run FOLDER OPTION...: one process; a folder for each combination of values; {name} stands for a setting.
run() {
    local command=("${RETUNE[@]}" "${@:2}" --output "$RESULTS/runs/$1/{scenario}-seed{seed}")
    if grep -qxsF -- "${command[*]}" "$DONE"; then return; fi
    mkdir -p "$RESULTS/runs"
    rm -f "$RESULTS/runs/tables.txt"
    local commit changed
    commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
    changed=$(git diff --quiet HEAD 2>/dev/null || echo " and changes")
    echo "$(date -u +%FT%TZ) commit $commit$changed: ${command[*]}" | tee -a "$RESULTS/commands.txt"
    "${command[@]}" >>"$RESULTS/runs/log.txt" || { echo "failed: ${command[*]}" >&2; exit 1; }
    echo "${command[*]}" >>"$DONE"
}

# A table each: what it needs beside RE-tune as the paper has it, which all tables compare with.
EVERY="--scenario joint data label class"
main()        { run "data-{parts}" --scenario data --parts 10 20; }
forgetting()  { run "{method}" --method linear mlp ewc lwf replay joint --scenario data label class; }
adaptors()    { run "{adaptor}-{adapt}" --adaptor mlp linear --adapt both shared image text $EVERY
                run "residual-{logit_scale}-{lr}" --adaptor residual --lr 1e-3 1e-4 --logit-scale 1 10 $EVERY
              }
prompts()     { for o in "--pool single max" --no-negatives "--wording generic" "--score pos"; do
                run "prompts-{pool}-{negatives}-{wording}-{score}" $o --scenario joint class; done; }
order()       { run order --class-order random --scenario class --seed $ORDERS; }
cost()        { forgetting; }
calibration() { forgetting; }
figures()     { forgetting; }

run "{adaptor}-{adapt}" $EVERY
for table in $ONLY; do "$table"; done

if grep -qxsF -- "$ONLY" "$RESULTS/runs/tables.txt"; then
    echo "nothing to do: every run, table and figure is in $RESULTS; delete it to start again"
else
    command=(python tables.py "$RESULTS" --only $ONLY)
    "${command[@]}" || { echo "failed: ${command[*]}" >&2; exit 1; }
    echo "$ONLY" >>"$RESULTS/runs/tables.txt"
fi
