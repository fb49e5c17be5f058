/*
 * Kernels of one workspace that run at the same time on several streams of one rank, for Spin. That is an error of the
 * user, and has to be reported: whatever is not reported must have been as if the calls had come one after the other.
 * README.md says more.
 *
 * A process is one CTA of one call. Its entry warp loads the state, once for all its warps. Data are left out: what
 * counts is which call acts under which epoch, and what becomes of the state. CHECK says which checks a CTA makes. With
 * PER_WARP the row warps load the state for themselves, and nobody compares: what that breaks is why a CTA has one
 * reader.
 */
#ifndef GRIDS
#define GRIDS { 2, 2 }      /* CTAs of each call; all of them may run at once */
#endif
#ifndef CALLS
#define CALLS 2
#endif
#define BY_ID    1          /* what a CTA finds in `arrived` must be a multiple of what it adds,
                               which holds its launch's id */
#define BY_EPOCH 2          /* with its arrival, in one atomic, a CTA finds the epoch that it has loaded */
#define BY_CAS   4          /* the last to arrive advances the state by compare-and-swap */
#define BY_TAG   8          /* what a CTA adds to `arrived` also holds the epoch that it has loaded */
#ifndef CHECK
#define CHECK (BY_ID + BY_EPOCH)
#endif

#ifdef SAME_IDS
#define ID(k) 1
#else
#define ID(k) ((k) + 1)
#endif
#ifdef PER_WARP
#define ROWS_HOLD_IT (loaded_rows && (reported || finished >= base_rows))
#else
#define ROWS_HOLD_IT true   /* the entry warp hands it to them */
#endif
#define ADDS (1 + ((ID(k) + (CHECK & BY_TAG -> 4 * e : 0)) << 4))
#define COUNT(x) ((x) & 15)

byte epoch, launched, finished;     /* no wraps here: ring.pml has them */
short arrived;
bool reported;
byte grid[CALLS] = GRIDS;
byte done[CALLS], triggered[CALLS];
byte least[CALLS] = 255, most[CALLS];   /* the epochs under which a call acts (ghosts) */

#ifdef IN_ORDER             /* one stream: a call may start when all CTAs of the one before it have triggered */
#define MAY_START(k) ((k) == 0 || triggered[(k) - 1] == grid[(k) - 1])
#else
#define MAY_START(k) true
#endif

inline acts(e) {
    if
    :: e < least[k] -> least[k] = e
    :: else
    fi;
    if
    :: e > most[k] -> most[k] = e
    :: else
    fi
}

inline report() {
    printf("call %d CTA %d: reports the overlap\n", k, c);
    reported = true
}

proctype cta(byte k; byte c) {
    byte e, base;           /* as loaded by the entry warp */
    byte stage;
    bool loaded;
#ifdef PER_WARP
    byte e_rows, base_rows; /* as loaded by the row warps */
    bool loaded_rows;
#endif

    do
    :: d_step { stage == 0 && !loaded && MAY_START(k) ->
        loaded = true;
        e = epoch;
        base = launched;
        printf("call %d CTA %d: its entry warp reads epoch %d\n", k, c, e)
       }
#ifdef PER_WARP
    :: d_step { stage == 0 && !loaded_rows && MAY_START(k) ->
        loaded_rows = true;
        e_rows = epoch;
        base_rows = launched;
        printf("call %d CTA %d: its row warps read epoch %d\n", k, c, e_rows)
       }
#endif
    /* Quiescence. Waits are bounded: once the overlap has been reported they end. */
    :: d_step { stage == 0 && loaded && (reported || finished >= base) && ROWS_HOLD_IT ->
        acts(e);
#ifdef PER_WARP
        acts(e_rows);
#endif
        stage = 1
       }
    :: d_step { stage == 1 ->
        printf("call %d CTA %d: arrives, finds epoch %d and %d arrivals\n", k, c, epoch, COUNT(arrived));
        stage = (COUNT(arrived) + 1 == grid[k] -> 2 : 3);
        if
        :: ((CHECK & BY_ID) && (arrived != COUNT(arrived) * ADDS || COUNT(arrived) >= grid[k])) ||
           ((CHECK & BY_EPOCH) && epoch != e) ->
            report();
            stage = 3
        :: else
        fi;
        arrived = arrived + ADDS
       }
    :: d_step { stage == 2 ->           /* was the last to arrive */
        if
        :: (CHECK & BY_CAS) && (epoch != e || arrived != grid[k] * ADDS) -> report()
        :: else ->
            printf("call %d CTA %d: advances the state to epoch %d\n", k, c, e + 1);
            if
            :: epoch != e -> printf("    ... which it has been advanced to already\n")
            :: else
            fi;
#ifdef TWICE
            assert(epoch == e || reported);     /* only this is looked for */
#else
            assert(epoch == e || !(CHECK & BY_EPOCH));      /* the state is never advanced twice, reported or not */
#endif
            epoch = e + 1;
            launched = base + grid[k];
            arrived = 0
        fi;
        stage = 3
       }
    :: d_step { stage == 3 ->
        triggered[k]++;
        stage = 4
       }
    :: d_step { stage == 4 ->
        finished++;
        done[k]++;
        e = 0; base = 0; loaded = false;
#ifdef PER_WARP
        e_rows = 0; base_rows = 0; loaded_rows = false;
#endif
        stage = 5
       }
    :: stage == 5 -> break
    od
}

#define WHOLE(k) (least[k] == most[k])                      /* the call acted under one epoch */

init {
    byte k, c;
    atomic {
        for (k : 0 .. CALLS - 1) {
            for (c : 0 .. grid[k] - 1) { run cta(k, c) }
        }
        k = 0;
        c = 0
    };
    d_step { done[0] == grid[0] && done[CALLS - 1] == grid[CALLS - 1] && done[1] == grid[1] ->
        printf("    ... at the end the state is: epoch %d, launched %d; %d CTAs have finished\n",
               epoch, launched, finished);
#ifndef TWICE
        assert(reported || (WHOLE(0) && WHOLE(1) && WHOLE(CALLS - 1)));         /* no call is torn between two epochs */
        assert(reported || (least[0] != least[1] &&
                            (CALLS == 2 || (least[0] != least[CALLS - 1] && least[1] != least[CALLS - 1]))));
        assert(reported || (epoch == CALLS && launched == finished && arrived == 0));
#endif
#ifdef IN_ORDER
        assert(!reported)                                   /* no false alarm */
#endif
    }
}
