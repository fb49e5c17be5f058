/*
 * Two-shot's queue, for Spin: a cluster takes batches of rows one after the other, and each of its three stages
 * (scatter, reduce, gather) runs LAG batches behind the one before it. README.md says more.
 *
 * A row has a vector for each owner. Calls follow each other, each in the next slot; a cluster clears its share of the
 * slot of the previous call at any time in this one. What is stored says which call it is of, as cells are of one row.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef CALLS
#define CALLS 4
#endif
#ifndef ROWS
#define ROWS 4
#endif
/* Of rank 0 and of the others. */
#ifndef CLUSTERS_0
#define CLUSTERS_0 1
#endif
#ifndef CLUSTERS_1
#define CLUSTERS_1 2
#endif
#ifndef BATCH_0
#define BATCH_0 1           /* rows that a cluster takes at once */
#endif
#ifndef BATCH_1
#define BATCH_1 1
#endif
#ifndef LAG_0
#define LAG_0 1
#endif
#ifndef LAG_1
#define LAG_1 1
#endif
#ifdef BREAK_FALLING
#define FALLING (r == 1)    /* takes its batches from the last on */
#else
#define FALLING false
#endif
#define CLUSTERS (r == 0 -> CLUSTERS_0 : CLUSTERS_1)
#define BATCH (r == 0 -> BATCH_0 : BATCH_1)
#define SUMS (r == 0 -> LAG_0 : LAG_1)  /* batches that reduce runs behind scatter, and */
#ifdef BREAK_STAGES
#define WHOLE 0                         /* the last stage runs ahead of the one that it waits for */
#else
#define WHOLE (2 * SUMS)                /* gather behind scatter */
#endif
#ifndef SLOTS
#define SLOTS 3
#endif

#define CLEAR 0
#define TAKEN 255
#define TAG(n) ((n) % 6 + 1)

#define PLACES (RANKS * ROWS)
byte rows[RANKS * SLOTS * PLACES];      /* stage 1, at the owner: [source][row] */
byte sums[RANKS * SLOTS * PLACES];      /* stage 2, at every rank: [row][owner] */
byte finished[RANKS];                   /* clusters, of all calls */

#define SLOT(n) ((n) % SLOTS)
#define IN1(at, n, src, row)   (((at) * SLOTS + SLOT(n)) * PLACES + (src) * ROWS + (row))
#define IN2(at, n, row, owner) (((at) * SLOTS + SLOT(n)) * PLACES + (row) * RANKS + (owner))

#define FIRST_ROW(b) (((b) * CLUSTERS + c) * BATCH)
#define BATCHES ((ROWS + CLUSTERS * BATCH - 1 - c * BATCH) / (CLUSTERS * BATCH))
#define TURN(b) (FALLING -> BATCHES - 1 - (b) : (b))

inline land(place, n) {
    assert(place == CLEAR);             /* never over what has not been cleared, or not been read */
    place = TAG(n)
}
inline take(place, n) {
    assert(place == TAG(n));
    place = TAKEN
}

/* All that reduce, or gather, awaits of a batch has come: of any call, since a wait looks for no more. A warp that sums
   for several rows sends none before it has all, so a batch is awaited as a whole. */
#if RANKS > 2
#define HERE(cells, in, row) (cells[in(r, n, 0, row)] != CLEAR && cells[in(r, n, 1, row)] != CLEAR && \
                              cells[in(r, n, 2, row)] != CLEAR)
#else
#define HERE(cells, in, row) (cells[in(r, n, 0, row)] != CLEAR && cells[in(r, n, 1, row)] != CLEAR)
#endif
#define NONE_OR(k, b, cells, in) (k >= BATCH || FIRST_ROW(TURN(b)) + k >= ROWS || HERE(cells, in, FIRST_ROW(TURN(b)) + k))
#define COME(b, cells, in) (NONE_OR(0, b, cells, in) && NONE_OR(1, b, cells, in) && \
                            NONE_OR(2, b, cells, in) && NONE_OR(3, b, cells, in))
#define BY_ROW(at, n, owner, row) IN2(at, n, row, owner)

inline for_rows(b) { row = FIRST_ROW(TURN(b)); end = (row + BATCH < ROWS -> row + BATCH : ROWS) }

proctype cluster(byte r; byte c) {
    byte n, step, peer, row, end, q, i;
    byte stage;             /* 0 scatter, 1 reduce awaits, 2 reduce sends, 3 gather */
    bool cleared;
end_idle:
    do
    :: atomic { n < CALLS && finished[r] >= n * CLUSTERS && c < CLUSTERS ->
        printf("rank %d call %d CTA %d: starts\n", r, n, c)
       };
        do
        :: d_step { stage == 0 && step < BATCHES ->
            q = (r + 1 + peer) % RANKS;
            for_rows(step);
            printf("rank %d call %d CTA %d: scatters rows %d to %d to rank %d\n", r, n, c, row, end - 1, q);
            do
            :: row < end -> land(rows[IN1(q, n, r, row)], n); row++
            :: else -> break
            od;
            peer++;
            if
            :: peer == RANKS -> peer = 0; stage = 1
            :: else
            fi;
            q = 0; row = 0; end = 0
           }
        :: d_step { !cleared ->                                 /* its share */
            cleared = true;
            i = c;
            q = (r * SLOTS + SLOT(n + SLOTS - 1));
            printf("rank %d call %d CTA %d: clears its share\n", r, n, c);
            do
            :: n > 0 && i < PLACES ->
                assert(rows[q * PLACES + i] == TAKEN && sums[q * PLACES + i] == TAKEN);
                rows[q * PLACES + i] = CLEAR;
                sums[q * PLACES + i] = CLEAR;
                i = i + CLUSTERS
            :: else -> break
            od;
            i = 0; q = 0
           }
        :: d_step { stage == 0 && step >= BATCHES && step < BATCHES + WHOLE -> stage = 1 }
        :: d_step { stage == 1 && (step < SUMS || step - SUMS >= BATCHES) -> stage = 3 }
        :: d_step { stage == 1 && step >= SUMS && step - SUMS < BATCHES && COME(step - SUMS, rows, IN1) ->
            for_rows(step - SUMS);
            printf("rank %d call %d CTA %d: has rows %d to %d of all, and sums them\n", r, n, c, row, end - 1);
            do
            :: row < end ->
                q = 0;
                do
                :: q < RANKS -> take(rows[IN1(r, n, q, row)], n); q++
                :: else -> break
                od;
                row++
            :: else -> break
            od;
            q = 0; row = 0; end = 0;
            stage = 2
           }
        :: d_step { stage == 2 ->
            q = (r + 1 + peer) % RANKS;
            for_rows(step - SUMS);
            printf("rank %d call %d CTA %d: sends sums of rows %d to %d to rank %d\n", r, n, c, row, end - 1, q);
            do
            :: row < end -> land(sums[IN2(q, n, row, r)], n); row++
            :: else -> break
            od;
            peer++;
            if
            :: peer == RANKS -> peer = 0; stage = 3
            :: else
            fi;
            q = 0; row = 0; end = 0
           }
        :: d_step { stage == 3 && step >= WHOLE && COME(step - WHOLE, sums, BY_ROW) ->
            for_rows(step - WHOLE);
            printf("rank %d call %d CTA %d: has all sums of rows %d to %d\n", r, n, c, row, end - 1);
            do
            :: row < end ->
                q = 0;
                do
                :: q < RANKS -> take(sums[IN2(r, n, row, q)], n); q++
                :: else -> break
                od;
                row++
            :: else -> break
            od;
            q = 0; row = 0; end = 0;
            stage = 0;
            step++
           }
        :: d_step { stage == 3 && step < WHOLE -> stage = 0; step++ }
        :: d_step { stage == 0 && step == BATCHES + WHOLE && cleared ->
            printf("rank %d call %d CTA %d: finishes\n", r, n, c);
            finished[r]++;
            step = 0;
            cleared = false;
            n++
           };
           break
        od
    :: c >= CLUSTERS || n == CALLS -> break
    od
}

init {
    byte i;
    atomic {
        for (i : 0 .. RANKS - 1) {
            run cluster(i, 0);
            run cluster(i, 1)
        }
        i = 0
    }
}
