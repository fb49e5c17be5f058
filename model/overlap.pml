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
#define BY_SWAP 16          /* the last to arrive exchanges the state, and then compares what was there */
#ifndef CHECK
#define CHECK (BY_ID + BY_EPOCH)
#endif
#ifndef MODES
#define MODES 0             /* 1: any call may be light: it triggers nothing before its CTAs end, and looks at what its
                               arrival has found as a step of its own, before it ends. Nothing else of it depends on
                               that: nobody waits for it */
#endif
/* How a light call is counted, in `launched` and `finished`. As ring.pml has it: by its last arrival, and by each CTA
   that ends. */
#define AS_EARLY 0
#define NEVER    1
#define AT_ONCE  2          /* in both, by its last arrival */
#define BY_NEXT  3          /* in both, by the last arrival of the call behind it */
#ifndef COUNTED
#define COUNTED AS_EARLY
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
bool mixed;                             /* a call acts while one of an earlier epoch still runs (a ghost) */
#if MODES
bool light[CALLS];
byte owed;                              /* CTAs that the next call will count (BY_NEXT) */
#define LIGHT light[k]
#else
#define LIGHT false
#endif

#ifdef IN_ORDER             /* one stream: a call may start when all CTAs of the one before it have triggered */
#define MAY_START(k) ((k) == 0 || triggered[(k) - 1] == grid[(k) - 1])
#else
#define MAY_START(k) true
#endif

#define RUNS_BEFORE(o, e) ((o) != k && least[o] < e && done[o] < grid[o])

inline acts(e) {
    if
    :: e < least[k] -> least[k] = e
    :: else
    fi;
    if
    :: e > most[k] -> most[k] = e
    :: else
    fi;
    if
    :: RUNS_BEFORE(0, e) || RUNS_BEFORE(1, e) || RUNS_BEFORE(CALLS - 1, e) ->
        printf("call %d CTA %d: goes on under epoch %d while a call of an earlier one runs\n", k, c, e);
        mixed = true
    :: else
    fi
}

/* As the state advances. */
inline count() {
#if MODES
    if
    :: COUNTED == BY_NEXT -> launched = launched + owed; finished = finished + owed; owed = (LIGHT -> grid[k] : 0)
    :: else
    fi;
    if
    :: LIGHT && COUNTED == AT_ONCE -> finished = finished + grid[k]
    :: else
    fi;
#endif
    if
    :: !LIGHT || COUNTED == AS_EARLY || COUNTED == AT_ONCE -> launched = launched + grid[k]
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
    bool alone;             /* what the arrival found is of this call */
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
        alone = !(((CHECK & BY_ID) && (arrived != COUNT(arrived) * ADDS || COUNT(arrived) >= grid[k])) ||
                  ((CHECK & BY_EPOCH) && epoch != e));
        if
        :: !alone && !LIGHT -> report(); alone = true; stage = 3
        :: else
        fi;
        arrived = arrived + ADDS
       }
    :: d_step { (stage == 2 || stage == 3) && LIGHT && !alone ->    /* a light call looks at it only now */
        report();
        alone = true;
        stage = 3
       }
    :: d_step { stage == 2 && alone ->      /* was the last to arrive */
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
            if
            :: (CHECK & BY_SWAP) && (epoch != e || launched != base) -> report()
            :: else
            fi;
            epoch = e + 1;
            launched = base;
            arrived = 0;
            count()
        fi;
        stage = 3
       }
    :: d_step { stage == 3 && alone ->
        if
        :: !LIGHT -> triggered[k]++
        :: else
        fi;
        stage = 4
       }
    :: d_step { stage == 4 ->
        if
        :: LIGHT -> triggered[k]++          /* by its end */
        :: else
        fi;
        if
        :: !LIGHT || COUNTED == AS_EARLY -> finished++
        :: else
        fi;
        done[k]++;
        e = 0; base = 0; loaded = false; alone = false;
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
#if MODES
            if
            :: light[k] = true; printf("call %d is light\n", k)
            :: light[k] = false
            fi;
#endif
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
        assert(reported || !mixed);                         /* each waited for the one before it */
        assert(reported || (epoch == CALLS && launched == finished && arrived == 0));
#endif
#ifdef IN_ORDER
        assert(!reported)                                   /* no false alarm */
#endif
    }
}
