#!/usr/bin/env bash
# Every table and figure of the three papers: runs what is missing, then writes Markdown, LaTeX, CSV and PNG.
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
OUT=${OUT:-experiments/results} # results go to $OUT/$DATA-$ENCODER, embeddings to $OUT/cache
OPTIONS=${OPTIONS:-}            # more options of retune.py, such as "--view frontal --contiguous"
ONLY=${ONLY:-summary main forgetting adaptors prompts cost calibration methods intervals differences rivals orders figures adaptor cleft}

[[ $DATA == demo ]] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # its matrices are too small to divide
RESULTS=$OUT/$DATA-$(basename "$ENCODER")
SHARED=(--data "$DATA" ${DATA_DIR:+--data-dir "$DATA_DIR"} --encoder "$ENCODER"
    ${ENCODER_DIR:+--encoder-dir "$ENCODER_DIR"} --cache-dir "$OUT/cache" --no-figures $OPTIONS --seed $SEEDS)
DONE=$RESULTS/runs/finished.txt

# once COMMAND...: runs a command that has not ended well before, and records it with the commit.
once() {
    if grep -qxsF -- "$*" "$DONE"; then return; fi
    mkdir -p "$RESULTS/runs"
    rm -f "$RESULTS/runs/tables.txt"
    local commit changed
    commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
    changed=$(git diff --quiet HEAD 2>/dev/null || echo " and changes")
    echo "$(date -u +%FT%TZ) commit $commit$changed: $*" | tee -a "$RESULTS/commands.txt"
    "$@" >>"$RESULTS/runs/log.txt" || { echo "failed: $*" >&2; exit 1; }
    echo "$*" >>"$DONE"
}

# run FOLDER OPTION=VALUE,VALUE...: every combination; {name} in the folder stands for a setting.
run() {
    once python -m experiments.sweep --grid "${@:2}" -- "${SHARED[@]}" \
        --output "$RESULTS/runs/$1/{scenario}-seed{seed}"
}

# compare FOLDER OPTION=VALUE,VALUE...: the same in every scenario.
compare() {
    run "$1" scenario=joint,class,label,data "${@:2}"
    run "$1-{parts}" scenario=data parts=10,20 "${@:2}"
}

# What each table needs beside RE-tune as the paper has it, which all of them compare with.
main()        { :; }
forgetting()  { run "{method}-{whiten}" scenario=class,label,data method=linear,mlp,ewc,lwf,replay,joint whiten=no; }
cost()        { forgetting; }
calibration() { forgetting; }
adaptors()    { local every=scenario=joint,class,label,data
                run "{adaptor}-{adapt}" $every adaptor=mlp adapt=shared,image,text
                run "{adaptor}-{adapt}" $every adaptor=linear adapt=both,shared,image,text
                run "residual-{logit_scale}-{lr}" $every adaptor=residual lr=1e-3,1e-4 logit-scale=1,10; }
prompts()     { local option; for option in pool=single,max no-negatives=yes wording=generic score=pos; do
                run "prompts-{pool}-{negatives}-{wording}-{score}" scenario=joint,class $option; done; }
methods()     { compare "{method}-{whiten}" method=linear,mlp,ewc,lwf,replay,joint,ncm,slda,l3a whiten=no,yes
                compare "{method}-{whiten}" method=retune whiten=yes
                compare "{method}" method=distil,analytic
                compare "{method}-linear" method=analytic "set=features=0"
                compare "{method}-1000" method=analytic "set=features=1000"
                compare "{method}-1000-own" method=analytic "set=features=1000 shared=0"
                compare "{method}-{whiten}" method=ranpac whiten=no,yes
                compare "{method}-{whiten}-zero" method=ranpac "set=zero_shot=1" whiten=no,yes; }
summary()     { methods; }
intervals()   { methods; }
differences() { methods; }
rivals()      { methods; }
figures()     { methods; }
orders()      { local order=("scenario=class" "class-order=random" "seed=${ORDERS// /,}")
                run "order-{method}-{whiten}" "${order[@]}" method=retune,distil,analytic
                run "order-{method}-1000" "${order[@]}" method=analytic "set=features=1000"
                run "order-{method}-{whiten}" "${order[@]}" method=lwf,ewc whiten=yes
                run "order-{method}-{whiten}" "${order[@]}" method=slda whiten=no
                run "order-{method}-zero" "${order[@]}" method=ranpac "set=zero_shot=1" whiten=yes; }
# The tables of the other two papers are made by one command each; runs stay in `runs`, what it wrote goes above.
paper() {
    local folder=$OUT/$1-$DATA
    once python -m "$@" --data "$DATA" ${DATA_DIR:+--data-dir "$DATA_DIR"} --cache-dir "$OUT/cache" \
        --output "$folder/runs"
    mkdir -p "$folder/runs"
    find "$folder/runs" -maxdepth 1 -type f ! -name ".*" -exec cp {} "$folder" \;
}
adaptor()     { paper adaptor grid; }
cleft()       { paper cleft tables; }

compare retune method=retune
TABLES=()
for table in $ONLY; do
    "$table"
    [[ $table == adaptor || $table == cleft ]] || TABLES+=("$table")
done

if grep -qxsF -- "$ONLY" "$RESULTS/runs/tables.txt"; then
    echo "nothing to do: every run, table and figure is in $RESULTS; delete it to start again"
else
    command=(python -m experiments.tables "$RESULTS" --only "${TABLES[@]}")
    [[ ${#TABLES[@]} == 0 ]] || "${command[@]}" || { echo "failed: ${command[*]}" >&2; exit 1; }
    echo "$ONLY" >>"$RESULTS/runs/tables.txt"
fi
