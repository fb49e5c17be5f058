/*
 * The ring of docs/protocol.md, for Spin. What is abstracted, and why that is sound, is in README.md; check.py runs it.
 *
 * A rank runs calls 0, 1, ... in stream order. A call is one grid of CTAs; a process below is one CTA of one rank, and
 * serves every second call, so that two calls of a rank can be in flight at once (a call may start when all CTAs of the
 * one before it have triggered, which those of a light call do by ending). Nothing here spins: a wait is a guard, so a
 * wait that never ends shows as an invalid end state.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef CALLS
#define CALLS 6             /* even; with FOREVER a multiple of 6, and calls go round without end */
#endif
#ifndef VECS
#define VECS RANKS          /* vectors of a row in two-shot: rank v owns vector v, so with VECS < RANKS some
                               rank owns none */
#endif
#ifndef CAP
#define CAP 8               /* vectors a slot can hold */
#endif
#ifndef CMAX
#define CMAX 2              /* most CTAs in a grid */
#endif
#ifndef SELF
#define SELF 1              /* a send also goes to the sender's own slot, and is awaited there. 1: in steps of its
                               own, torn and late as any other; 2: in one step with the store, or the poll, before it
                               (README.md: why that is sound); 0: not at all */
#endif
#ifndef EARLY
#define EARLY 1             /* 0: every call waits for the whole of its predecessor (no kernel between that never
                               waits) */
#endif
#ifndef MODES
#define MODES 0             /* 1: each call of each rank is light or triggers early, as is chosen when it starts.
                               A light call triggers nothing (PDL off, or late): what stands behind it starts when all
                               of its CTAs have ended. It neither fences its clears nor waits with its polls for its
                               arrival. 0: all calls trigger early */
#endif
#ifndef GAP
#define GAP 0               /* what stands behind a light call. 0: the next call, or kernels that wait: its clears have
                               landed when the next call starts; 1: a kernel that never waits: they land when they
                               like; 2: the same, but before what the next call sends lands at a peer. Behind a call
                               that triggers early there may always be a kernel that never waits */
#endif
#ifndef FENCED
#define FENCED 0            /* 1: light calls fence their clears too, as large ones do */
#endif
#ifndef FAULT
#define FAULT 0             /* 1: rank 0 gives up waiting wherever it likes; other ranks are told when it pleases.
                               Who has given up waits for nothing more in that call, but goes on sending its rows; of
                               a sum that it does not have it sends nothing. 2: nor does it take what comes then,
                               for large searches */
#endif
#ifndef LINK
#define LINK 0              /* 1: stores to peers land whenever they like, in any order; 0: at once */
#endif
#ifndef LOOSE
#define LOOSE 0             /* 1: a CTA's clear, arrival and polls in any order; 0: in program order */
#endif
#ifndef CHECKS
#define CHECKS 2            /* 2: every assertion; 1: only what a user would see, wrong data read or a hang;
                               0: only a hang */
#endif
#ifndef TEAR
#define TEAR 0              /* 1: a vector lands in two pieces */
#endif
#ifndef QUEUE
#define QUEUE 0             /* most rows of a CTA in one-shot. It sends one, awaits it, and only then sends its next
                               one (AHEAD). 0: at most two, sent and then awaited together */
#endif
#ifndef AHEAD
#define AHEAD 0             /* 0: in a QUEUE a row is sent only when the one before it has come from all, as in the
                               kernel; 1: one row ahead: it is sent before the one before it is awaited */
#endif

/* Shapes: tokens, CTAs, two-shot. A script gives each call its shape; NONDET lets the first rank to reach a call
   choose. 7 to 9 need QUEUE. 7 is three rows for each CTA, 8 and 9 are five rows and another grid on each rank. */
#define TOKENS(s)  (((s) == 1 || (s) == 4) -> 2 : ((s) == 2 -> 3 : ((s) == 7 -> 6 : ((s) >= 8 -> 5 : 1))))
#define CTAS(s)    ((s) == 0 || (s) == 6 || CMAX == 1 || ((s) == 8 && r == 0) || ((s) == 9 && r != 0) -> 1 : 2)
#define TWOSHOT(s) ((s) == 3 || (s) == 4 || (s) == 6)
#ifndef SCRIPT
#define SCRIPT { 0, 2, 3, 1, 4, 5 }
#endif

/* Epochs wrap at a multiple of three; the model starts two calls before the wrap so that it crosses it. */
#ifdef BREAK_WRAP
#define EPOCHS 16           /* as 2^32, one more than a multiple of three */
#else
#define EPOCHS 6
#endif
#define FIRST (EPOCHS - 2)
#define NEXT(e) (((e) + 1) % EPOCHS)
#define COUNT 4             /* `launched` and `finished` count modulo this, as the real ones do modulo 2^32 */

#define CLEAR 0             /* the sentinel in every word */
#define TORN  254           /* some words have arrived, some are still the sentinel */
#define NAN   253           /* a sum that is none */
#define TAKEN 255           /* has been read by the one CTA that awaits it: may now be cleared (a ghost, not a value) */

#if CHECKS > 1
#define GHOST(x) assert(x)
#else
#define GHOST(x) skip
#endif
#if CHECKS > 0
#define READS(x) assert(x)
#else
#define READS(x) skip
#endif

byte cell[RANKS * 3 * CAP];
byte epoch[RANKS], launched[RANKS], dirty[RANKS], arrived[RANKS], finished[RANKS];
#ifdef BREAK_LATE
byte older[RANKS];          /* the extent of the call before, so that only the choice of slot is wrong */
#endif
#if LINK
byte flying[RANKS * 3 * CAP];   /* a store that has left its sender but not landed, by the cell it is for */
byte inflight[RANKS];
#endif

/* The streams: which call may start, which of its CTAs have started, how many have triggered. */
byte ready[RANKS], begun[RANKS], triggered[RANKS];
#if !EARLY || MODES
byte undone[RANKS * 2];     /* CTAs of the latest call that are still to finish, for even and for odd calls */
#endif
#if MODES
bool light[RANKS * 2];      /* of the latest even and odd call */
#endif
#if FAULT
bool broken[RANKS];         /* each rank's word, set by who reports a fault */
#ifdef BREAK_LATE_MARK
bool marking[RANKS];        /* the word has been stored, and has still to land */
#define MARK(r) marking[r]
#else
#define MARK(r) broken[r]
#endif
#endif
#ifdef NONDET
#define NONE 255
byte shape[CALLS] = NONE;
#define CHOSEN(r) (shape[ready[r]] != NONE)
#else
byte shape[CALLS] = SCRIPT;
#define CHOSEN(r) true
#endif
#ifdef BREAK_GRID
byte resident[RANKS];       /* one CTA at a time fits */
#endif

/* Which call of the program a rank executes j-th. With PIECES every two launches are one call: its rows in two
   pieces. */
#ifdef PIECES
#ifdef BREAK_PIECES
/* Rank 1 leaves call 0 behind its first piece. */
#define LAUNCH(r, j) ((r) == 1 && (j) > 0 -> ((j) + 1) % CALLS : (j))
#else
#define LAUNCH(r, j) (j)
#endif
#define ID(r, j) (LAUNCH(r, j) / 2)
#define SHAPE(r, j) shape[LAUNCH(r, j)]
#else
#define SHAPE(r, j) shape[ID(r, j)]
#ifdef BREAK_ORDER
#define ID(r, j) ((r) == 1 && (j) == 1 -> 2 : ((r) == 1 && (j) == 2 -> 1 : (j)))
#else
#define ID(r, j) (j)
#endif
#endif

/* Which slot a call uses and which it clears. */
#if defined(BREAK_FROZEN_SLOT)
#define USED(n, j) ((FIRST + (j) % 2) % 3)  /* a graph of two calls, captured once, replayed over and over */
#define PREVIOUS(n, j) ((USED(n, j) + 2) % 3)
#elif defined(BREAK_TWO_SLOTS)
#define USED(n, j) ((n) % 2)
#define PREVIOUS(n, j) (((n) + 1) % 2)
#elif defined(BREAK_LATE)
#define USED(n, j) ((n) % 3)
#define PREVIOUS(n, j) (((n) + 1) % 3)
#elif defined(BREAK_SOON)
#define USED(n, j) ((n) % 3)
#define PREVIOUS(n, j) ((n) % 3)
#else
#define USED(n, j) ((n) % 3)
#define PREVIOUS(n, j) (((n) + 2) % 3)
#endif
/* For BREAK_FROZEN_SIZE: calls 1, 3, 5 are replays of one graph of one call, captured at call 1. */
#define GRAPH(j) ((j) % 2)

#define AT(rank, slot, i) (((rank) * 3 + (slot)) * CAP + (i))
#define EXTENT(s) (RANKS * TOKENS(s) + (TWOSHOT(s) -> TOKENS(s) * VECS : 0))
/* Dense in this call's tokens, so that one cell belongs to different rows of different calls. */
#define ONE(s, src, t) ((src) * TOKENS(s) + (t))
#define TWO(s, t, v) (RANKS * TOKENS(s) + (t) * VECS + (v))
/* What is stored says who stored it, in which call, for which row and stage. */
#if QUEUE
#define ROWS 6              /* most tokens of a shape */
#elif defined(PIECES)
#define ROWS 4              /* most tokens of two */
#else
#define ROWS 3
#endif
#define TAG(call, stage, src, t) (1 + (((call) * 2 + (stage)) * RANKS + (src)) * ROWS + (t))    /* t: in the call */

#define UNREAD(x) ((x) != CLEAR && (x) < NAN)
#define WHO(x) ((((x) - 1) / ROWS) % RANKS)
#define WHEN(x) (((x) - 1) / ROWS / RANKS / 2)

/* Call 1 carries a negative subnormal, call 3 the sentinel's own bits as payload. */
#ifdef BREAK_FLUSH
#define LOOKS_CLEAR(x) ((x) == CLEAR || ((x) >= TAG(1, 0, 0, 0) && (x) < TAG(2, 0, 0, 0)))
#else
#define LOOKS_CLEAR(x) ((x) == CLEAR)
#endif
#ifdef BREAK_SANITISE
#define WIRE(call, tag) ((call) == 3 -> CLEAR : (tag))
#else
#define WIRE(call, tag) (tag)
#endif
#ifdef BREAK_WORD
#define HERE(x) (!LOOKS_CLEAR(x))                      /* one word of the vector stands for all */
#else
#define HERE(x) (!LOOKS_CLEAR(x) && (x) != TORN)
#endif

/* Has the predecessor on this rank finished? `base` is `launched` as this CTA loaded it. CTAs of this very call may
   already have finished, so the difference is taken as a signed number and must not be negative; equality would be
   wrong. */
#ifdef EQUAL
#define QUIET(r, base) (finished[r] == (base))
#else
#define QUIET(r, base) ((finished[r] + COUNT - (base)) % COUNT < COUNT / 2)
#endif

#define PREDECESSOR (2 * r + 1 - odd)
#if !EARLY
#define MAY_START (undone[PREDECESSOR] == 0)
#elif MODES && !GAP
#define MAY_START (TRIGGERED_EARLY || undone[PREDECESSOR] == 0)
#elif MODES
#define MAY_START (begun[r] != 0 || undone[2 * r + odd] == 0)   /* no store outlives the next call but one */
#else
#define MAY_START true
#endif

#if MODES
#define LIGHT light[2 * r + odd]
#else
#define LIGHT false
#endif
#ifdef BREAK_LIGHT_TRIGGERS
#define TRIGGERED_EARLY true
#define TRIGGERS true
#else
#define TRIGGERED_EARLY (!light[PREDECESSOR])
#if FAULT
#define TRIGGERS (!LIGHT && !poisoned)
#else
#define TRIGGERS (!LIGHT)
#endif
#endif
#ifdef BREAK_UNFENCED
#define UNFENCED true
#else
#define UNFENCED (LIGHT && !FENCED)
#endif

#if defined(BREAK_GRID) && BREAK_GRID > 1
#define FITS (resident[r] == 0 && (c == 0 || begun[r] != 0))    /* ... and they start in turn */
#elif defined(BREAK_GRID)
#define FITS (resident[r] == 0)
#else
#define FITS true
#endif

/* Ranks are never three calls apart, so that tags that go round cannot be mistaken for one another. */
inline apart(p) { GHOST((ready[r] + CALLS - ready[p]) % CALLS != 3) }

inline trigger() {
    triggered[r]++;
    if
    :: triggered[r] == CTAS(s) ->
        triggered[r] = 0;
        begun[r] = 0;
#ifdef FOREVER
        ready[r] = (j + 1) % CALLS;
        apart(0);
#if RANKS > 2
        apart(1); apart(2);
#endif
        apart(RANKS - 1)
#else
        ready[r] = j + 1
#endif
    :: else
    fi
}

/* By a CTA that has arrived. */
inline trigger_early() {
    if
    :: TRIGGERS -> trigger()
    :: else
    fi
}

inline advance() {
    printf("rank %d call %d CTA %d: advances the state to epoch %d, dirty %d\n", r, j, c, NEXT(epoch[r]), EXTENT(s));
#ifdef BREAK_LATE
    older[r] = dirty[r];
#endif
    epoch[r] = NEXT(epoch[r]);
    launched[r] = (launched[r] + CTAS(s)) % COUNT;
    dirty[r] = EXTENT(s);
}

/* Row warps go through phases, one peer at a time, their own rank last: send, poll, and for two-shot send the sums,
   poll them. In a QUEUE they send a row, poll for it, send the next, poll for it, and so on. With AHEAD they send two
   rows, poll for the first, send the third, poll for the second, and so on. */
#define PHASE (step / RANKS)
#define PEER  ((r + 1 + step) % RANKS)
#if QUEUE > 2
#define DONE  (2 * QUEUE * RANKS)
#else
#define DONE  (4 * RANKS)
#endif
#define SENDING (PHASE % 2 == 0)
#define OWN_NEXT (SELF == 2 && step < DONE && PEER == r)
#define WHOLE (half || OWN_NEXT)    /* the second piece of a torn store, or one that does not tear */

/* Store one vector to cell x of rank `to`. */
inline land(to, x, v) {
    if
    :: cell[x] == TAKEN -> printf("    ... where old data has not been cleared away\n")
    :: UNREAD(cell[x]) -> printf("    ... over what rank %d stored there in call %d\n", WHO(cell[x]), WHEN(cell[x]))
    :: else
    fi;
    GHOST(cell[x] == CLEAR || cell[x] == TORN);         /* a write never lands on a cell that is not clear */
    cell[x] = v;
}
inline put(to, x, v) {
#if LINK
    if
    :: SELF == 2 && to == r -> land(to, x, v)
    :: else ->
        GHOST(flying[x] == 0);
        flying[x] = v;
        inflight[to]++
    fi
#elif TEAR
    if
    :: WHOLE -> land(to, x, v)
    :: else -> GHOST(cell[x] == CLEAR); cell[x] = TORN
    fi
#else
    land(to, x, v)
#endif
}

/* Read one awaited vector: it must be what its sender stored in this call for this row. */
inline take(x, v) {
    if
    :: cell[x] == TAKEN -> printf("    ... but these are left over: an earlier call has already read them\n")
    :: cell[x] == TORN -> printf("    ... but only part of them\n")
    :: cell[x] == NAN -> printf("    ... but these are no sums: their owner gave up\n")
    :: UNREAD(cell[x]) && cell[x] != v ->
        printf("    ... but they are what rank %d stored there in call %d, for row %d\n",
               WHO(cell[x]), WHEN(cell[x]), (cell[x] - 1) % ROWS)
    :: else
    fi;
    READS(cell[x] == v);
    cell[x] = TAKEN;
}

/* A CTA has rows c, c + CTAS, ...: at most MOST of them. */
#define HAS(k) (c + (k) * CTAS(s) < TOKENS(s))
#define HAS2 HAS(1)
#define MOST (QUEUE && !TWOS -> QUEUE : 2)
#ifdef BREAK_FALLING
#define ROW(k) (r * (TOKENS(s) - 1) + (1 - 2 * r) * (c + (k) * CTAS(s)))  /* rank 1 of two: from the last on */
#else
#define ROW(k) (c + (k) * CTAS(s))
#endif
#ifdef PIECES
#define ROW_OF_CALL(k) (before + ROW(k))
#else
#define ROW_OF_CALL(k) ROW(k)
#endif
/* In a QUEUE: which of its rows a phase awaits or, the first phase apart, sends. */
#define NTH (PHASE / 2 + (SENDING -> AHEAD : 0))

#define OTHERS (PEER != r || SELF)
#define TWOS TWOSHOT(s)
#if QUEUE
#define ONES (PHASE == 0 || HAS(NTH))
#else
#define ONES (PHASE < 2)
#endif
#define APPLIES (c < TOKENS(s) && OTHERS && ((!TWOS && ONES) || (TWOS && \
    ((PHASE == 0 && PEER < VECS) || (PHASE == 1 && r < VECS) || \
     (PHASE == 2 && r < VECS) || (PHASE == 3 && PEER < VECS)))))
inline skip_idle() {
    do
    :: step < DONE && !(APPLIES) -> step++
    :: else -> break
    od;
    i = 0                   /* Spin wants a d_step to end in a plain statement */
}

#define IN1(t) AT(r, use, ONE(s, PEER, t))
#define IN2(t) AT(r, use, TWO(s, t, PEER))
#define OUT1(t) AT(PEER, use, ONE(s, r, t))
#define OUT2(t) AT(PEER, use, TWO(s, t, r))
#if QUEUE
#define TOGETHER TWOS
#else
#define TOGETHER true
#endif
#define ARRIVED1 (TOGETHER -> HERE(cell[IN1(ROW(0))]) && (!HAS2 || HERE(cell[IN1(ROW(1))])) : HERE(cell[IN1(ROW(NTH))]))
#define ARRIVED2 (HERE(cell[IN2(ROW(0))]) && (!HAS2 || HERE(cell[IN2(ROW(1))])))
#define AWAITS1 (step < DONE && !SENDING && (!TWOS || PHASE == 1))
#define AWAITS2 (step < DONE && TWOS && PHASE == 3)

#if FAULT
#define HAS_NO_SUM gave_up
#else
#define HAS_NO_SUM false
#endif
#if FAULT == 2
#define LOOKS !gave_up
#else
#define LOOKS true
#endif
#ifdef BREAK_NAN            /* the sum of what has not come is sent like any other */
#define SENDS_NO_SUM \
    if \
    :: PEER != r -> \
        printf("rank %d call %d CTA %d: stores sums that it does not have into slot %d of rank %d\n", r, j, c, use, PEER); \
        put(PEER, OUT2(ROW(0)), NAN) \
    :: else \
    fi
#else
#define SENDS_NO_SUM skip
#endif

inline send() {
    if
    :: PHASE == 0 ->
        if
        :: TOGETHER || AHEAD ->
            printf("rank %d call %d CTA %d: stores its rows into slot %d of rank %d\n", r, j, c, use, PEER)
        :: else ->
            printf("rank %d call %d CTA %d: stores its first row, %d, into slot %d of rank %d\n",
                   r, j, c, ROW(0), use, PEER)
        fi;
        put(PEER, OUT1(ROW(0)), WIRE(id, TAG(id, 0, r, ROW_OF_CALL(0))));
        if
        :: HAS2 && (TOGETHER || AHEAD) -> put(PEER, OUT1(ROW(1)), WIRE(id, TAG(id, 0, r, ROW_OF_CALL(1))))
        :: else
        fi
#if QUEUE
    :: PHASE > 0 && !TWOS ->
        printf("rank %d call %d CTA %d: stores its next row, %d, into slot %d of rank %d\n",
               r, j, c, ROW(NTH), use, PEER);
        put(PEER, OUT1(ROW(NTH)), WIRE(id, TAG(id, 0, r, ROW_OF_CALL(NTH))))
#endif
    :: else ->
        if
        :: HAS_NO_SUM -> SENDS_NO_SUM
        :: else ->
            printf("rank %d call %d CTA %d: stores its sums into slot %d of rank %d\n", r, j, c, use, PEER);
            put(PEER, OUT2(ROW(0)), TAG(id, 1, r, ROW_OF_CALL(0)));
            if
            :: HAS2 -> put(PEER, OUT2(ROW(1)), TAG(id, 1, r, ROW_OF_CALL(1)))
            :: else
            fi
        fi
    fi
}
inline next_step() { step++; skip_idle() }
inline receive1() {
    if
    :: TOGETHER ->
        printf("rank %d call %d CTA %d: finds the rows of rank %d in slot %d\n", r, j, c, PEER, use);
        take(IN1(ROW(0)), TAG(id, 0, PEER, ROW_OF_CALL(0)));
        if
        :: HAS2 -> take(IN1(ROW(1)), TAG(id, 0, PEER, ROW_OF_CALL(1)))
        :: else
        fi
#if QUEUE
    :: else ->
        printf("rank %d call %d CTA %d: finds row %d of rank %d in slot %d\n", r, j, c, ROW(NTH), PEER, use);
        take(IN1(ROW(NTH)), TAG(id, 0, PEER, ROW_OF_CALL(NTH)))
#endif
    fi;
    next_step()
}
inline receive2() {
    printf("rank %d call %d CTA %d: finds the sums of rank %d in slot %d\n", r, j, c, PEER, use);
    take(IN2(ROW(0)), TAG(id, 1, PEER, ROW_OF_CALL(0)));
    if
    :: HAS2 -> take(IN2(ROW(1)), TAG(id, 1, PEER, ROW_OF_CALL(1)))
    :: else
    fi;
    next_step()
}

#if defined(BREAK_NO_QUIESCE)
#define CALM true
#elif defined(BREAK_LIGHT_UNCHECKED)
#define CALM (LIGHT || QUIET(r, base))
#else
#define CALM QUIET(r, base)
#endif
#if defined(BREAK_SEND_EARLY)
#define CALM_TO_SEND true
#define CALM_TO_CLEAR calm
#elif defined(BREAK_CLEAR_EARLY)
#define CALM_TO_SEND calm
#define CALM_TO_CLEAR true
#elif defined(BREAK_LATE_READERS)
#define CALM_TO_SEND rows_calm
#define CALM_TO_CLEAR rows_calm
#else
#define CALM_TO_SEND calm
#define CALM_TO_CLEAR calm
#endif
#if GAP == 2
#define MAY_LAND (PEER == r || undone[PREDECESSOR] == 0 || ready[r] != j)   /* `ready` moves on: all have sent */
#else
#define MAY_LAND true
#endif

#if LOOSE || defined(BREAK_LATE_READERS)
#define ENTRY_WARP 1        /* counts the CTA in without regard to how far the row warps are */
#else
#define ENTRY_WARP 0
#endif

/* Program order of a CTA. LOOSE drops what no fence or barrier of the protocol keeps. */
#if LOOSE || defined(BREAK_CLEAR_EARLY)
#define SENT true
#else
#define SENT (PHASE > 0)
#endif
#if ENTRY_WARP
#define CLEARED true
#define MAY_POLL true
#else
#define CLEARED (cleared || UNFENCED)
#define MAY_POLL (arr == 2 || LIGHT)
#endif
#ifdef BREAK_BLIND
#define SEES_IT !LIGHT
#else
#define SEES_IT true
#endif
#ifndef FOREVER
#define LEFT(r) (ready[r] < CALLS)
#else
#define LEFT(r) true
#endif
#define STARTS (LEFT(r) && CHOSEN(r) && ready[r] % 2 == odd && c < CTAS(SHAPE(r, ready[r])) && \
                !(begun[r] & (1 << c)) && MAY_START && FITS)

#ifdef GATE
#define MAY_FINISH (arr == 2 && epoch[r] != n)
#else
#define MAY_FINISH (arr == 2)
#endif

/* Counts the CTA out. If nothing has been triggered, its end does it. */
inline count_out() {
    printf("rank %d call %d CTA %d: finishes\n", r, j, c);
#if FAULT
    if
    :: gave_up -> MARK(r) = true
    :: else
    fi;
#endif
    finished[r] = (finished[r] + 1) % COUNT;
    if
    :: !TRIGGERS -> trigger()
    :: else
    fi
}

/* The CTA is gone, and all that it has stored has landed. */
inline leave() {
#ifdef BREAK_GRID
    resident[r]--;
#endif
#if !EARLY || MODES
    undone[2 * r + odd]--;
#endif
    j = 0; n = 0; base = 0; d = 0; step = 0; arr = 0; id = 0;
#ifdef BREAK_LATE_READERS
    loaded = false; rows_calm = false;
#endif
#if FAULT
    poisoned = false; gave_up = false; waits = false;
#endif
#ifdef PIECES
    before = 0;
#endif
    s = 0; use = 0; old = 0; calm = false; cleared = false
}

proctype cta(byte r; byte c; byte odd) {
    byte j, n, base, d, step, i, id, s, use, old;
    byte arr;               /* 0 not arrived, 1 arrived last and has to advance, 2 arrived, 3 finished, but its clear
                               has still to land, 4 finished, but its state has (BREAK_LATE_STATE) */
    bool calm, cleared;
#ifdef PIECES
    byte before;            /* rows of the call that are in an earlier piece */
#endif
#ifdef BREAK_LATE_READERS
    bool loaded, rows_calm; /* the row warps load the state for themselves when they get to it; the CTA may have
                               arrived by then */
#endif
#if FAULT
    bool poisoned;          /* found the workspace broken: does nothing */
    bool gave_up;
    bool waits;             /* its predecessor had not finished when it looked first */
#endif
#if TEAR && !LINK
    bool half;
#endif

end_idle:
    do
    /* 1. Launch, griddepcontrol.wait, load the state: once, for all warps of the CTA. */
#if MODES
    :: atomic { STARTS ->
        if
        :: begun[r] == 0 -> LIGHT = true
        :: begun[r] == 0 -> LIGHT = false
        :: begun[r] != 0
        fi;
        d_step {
#else
    :: d_step { STARTS ->
#endif
#ifdef BREAK_GRID
        resident[r]++;
#endif
        j = ready[r];
#if MODES
        if
        :: undone[PREDECESSOR] == 0 -> light[PREDECESSOR] = false   /* is not asked for any more */
        :: else
        fi;
#endif
#if !EARLY || MODES
        if
        :: begun[r] == 0 -> undone[2 * r + odd] = CTAS(SHAPE(r, j))
        :: else
        fi;
#endif
        begun[r] = begun[r] | (1 << c);
        n = epoch[r];
        id = ID(r, j);
        s = SHAPE(r, j);
#ifdef PIECES
        i = LAUNCH(r, j);
        before = (i % 2 == 0 -> 0 : TOKENS(shape[i - 1]));
#endif
        use = USED(n, j);
        old = PREVIOUS(n, j);
        base = launched[r];
        d = dirty[r];
        if
        :: LIGHT -> printf("rank %d call %d CTA %d: starts, light, reads epoch %d (slot %d), dirty %d\n",
                           r, j, c, n, use, d)
        :: else -> printf("rank %d call %d CTA %d: starts, reads epoch %d (slot %d), dirty %d\n", r, j, c, n, use, d)
        fi;
        assert(!HAS(MOST));                             /* the script asks for no row that the model would leave out */
        GHOST(n == (FIRST + j) % EPOCHS);       /* every CTA of a call reads the same epoch, that of this call */
#ifdef BREAK_TRIGGER
        trigger();
#endif
        skip_idle();
#if FAULT
        if
        :: broken[r] && SEES_IT ->
            printf("rank %d call %d CTA %d: finds the workspace broken\n", r, j, c);
            poisoned = true; calm = true; cleared = true; arr = 2; step = DONE
        :: else -> waits = !CALM
        fi;
        i = 0
#endif
       }
#if MODES
       }
#endif
       ;
    do
    /* 2. Quiescence, awaited by the entry warp. Only then do the other warps get what it has loaded. */
    :: d_step { !calm && CALM ->
        calm = true;
        printf("rank %d call %d CTA %d: goes on, having found finished %d, launched %d\n", r, j, c, finished[r], base);
#if FAULT
        if
        :: waits && broken[r] && SEES_IT ->     /* it looks again behind a wait */
            printf("rank %d call %d CTA %d: finds the workspace broken meanwhile\n", r, j, c);
            poisoned = true; cleared = true; arr = 2; step = DONE
        :: else
        fi;
        i = 0
#endif
       }

#ifdef BREAK_LATE_READERS
    :: d_step { !loaded ->
        loaded = true;
        n = epoch[r];
        base = launched[r];
        d = dirty[r];
        use = USED(n, j);
        old = PREVIOUS(n, j);
        printf("rank %d call %d CTA %d: its row warps read epoch %d (slot %d), launched %d\n", r, j, c, n, use, base)
       }
    :: d_step { loaded && !rows_calm && QUIET(r, base) ->
        rows_calm = true;
        printf("rank %d call %d CTA %d: its row warps go on, having found finished %d, launched %d\n",
               r, j, c, finished[r], base)
       }
#endif

    /* 3. Send, and send the sums, or the next row of a queue. */
    :: d_step { CALM_TO_SEND && step < DONE && SENDING && MAY_LAND ->
#if TEAR && !LINK
        if
        :: half -> printf("rank %d call %d CTA %d: ... the rest of them\n", r, j, c)
        :: else
        fi;
#endif
        send();
#if TEAR && !LINK
        if
        :: WHOLE -> half = false; next_step()
        :: else -> half = true
        fi;
#else
        next_step();
#endif
#if SELF == 2
        if
        :: OWN_NEXT && SENDING -> send(); next_step()
        :: else
        fi;
#endif
        i = 0
       }

    /* 4. Clear this CTA's share of what the call before dirtied. */
    :: d_step { !cleared && CALM_TO_CLEAR && (SENT) ->
#if defined(BREAK_FROZEN_SIZE)
        if
        :: GRAPH(j) -> d = EXTENT(shape[0])         /* what call 0 had dirtied when the graph was captured at call 1 */
        :: else
        fi;
#elif defined(BREAK_LATE)
        d = older[r];
#elif defined(BREAK_SOON)
        d = EXTENT(s);
#endif
        printf("rank %d call %d CTA %d: clears its share of the first %d vectors of slot %d\n", r, j, c, d, old);
        i = c;
        do
        :: i < d ->
            if
            :: UNREAD(cell[AT(r, old, i)]) ->
                printf("    ... and so destroys what rank %d stored there in call %d\n",
                       WHO(cell[AT(r, old, i)]), WHEN(cell[AT(r, old, i)]))
            :: else
            fi;
            /* a clear never destroys what has not been read, nor what is half there */
            GHOST(cell[AT(r, old, i)] == CLEAR || cell[AT(r, old, i)] == TAKEN);
            cell[AT(r, old, i)] = CLEAR;
            i = i + CTAS(s)
        :: else -> break
        od;
        /* the record was right: nothing of that slot lies beyond it */
        i = d;
        do
        :: i < CAP -> GHOST(cell[AT(r, old, i)] == CLEAR); i++
        :: else -> break
        od;
        i = 0;
        cleared = true
       }

    /* 5. Arrive; the last one advances the state; then trigger. Others may trigger as soon as they have arrived. */
    :: d_step { arr == 0 && calm && CLEARED && (PHASE > 0 || ENTRY_WARP) ->
        printf("rank %d call %d CTA %d: arrives\n", r, j, c);
        GHOST(epoch[r] == n);           /* the check against overlaps of overlap.pml gives no false alarm */
        arrived[r]++;
#ifdef BREAK_ADVANCE
        if
        :: arrived[r] == 1 -> advance()
        :: else
        fi;
#endif
        if
        :: arrived[r] == CTAS(s) ->
#ifdef BREAK_ADVANCE
            arrived[r] = 0;
            arr = 2;
            trigger_early()
#else
            arr = 1
#endif
        :: else ->
            arr = 2;
#ifndef BREAK_TRIGGER
            trigger_early()
#endif
        fi
       }
    :: d_step { arr == 1 ->
        advance();
        arrived[r] = 0;
#ifndef BREAK_TRIGGER
        trigger_early();
#endif
        arr = 2
       }

    /* 6. Wait. */
    :: d_step { AWAITS1 && MAY_POLL && LOOKS && ARRIVED1 ->
        receive1();
#if SELF == 2
        if
        :: OWN_NEXT && AWAITS1 && ARRIVED1 -> receive1()
        :: else
        fi;
#endif
        i = 0
       }
    :: d_step { AWAITS2 && MAY_POLL && LOOKS && ARRIVED2 ->
        receive2();
#if SELF == 2
        if
        :: OWN_NEXT && AWAITS2 && ARRIVED2 -> receive2()
        :: else
        fi;
#endif
        i = 0
       }

    /* 7. Finish. */
    :: d_step { step == DONE && cleared && MAY_FINISH -> count_out(); leave() };
       break
#if MODES || defined(BREAK_UNFENCED)
    :: d_step { step == DONE && !cleared && UNFENCED && MAY_FINISH -> count_out(); arr = 3 }
    :: d_step { arr == 3 && cleared -> leave() };
       break
#endif
#ifdef BREAK_LATE_STATE     /* the new state is stored, and nobody waits until it is there */
    :: d_step { step == DONE && cleared && arr == 1 && LIGHT -> count_out(); arr = 4 }
    :: d_step { arr == 4 ->
        printf("        the state of rank %d is that behind call %d only now\n", r, j);
        epoch[r] = NEXT(n);
        launched[r] = (base + CTAS(s)) % COUNT;
        dirty[r] = EXTENT(s);
        arrived[r] = 0;
        leave()
       };
       break
#endif
#if FAULT
    :: d_step { step < DONE && !SENDING && MAY_POLL && (r == 0 || broken[r]) ->
        printf("rank %d call %d CTA %d: gives up waiting for rank %d\n", r, j, c, PEER);
        gave_up = true;
        next_step();
        i = 0
       }
#endif
    od;
#ifdef PROGRESS
progress: skip              /* for the search for endless runs without it; else one state less */
#endif
    od
}

#if LINK
/* The link into one rank: lands any store that is on its way, a piece at a time if TEAR. */
proctype link(byte to) {
    byte i, left;
end:
    do
    :: atomic { inflight[to] > 0 ->
        left = inflight[to];
        i = to * 3 * CAP;
        do
        :: flying[i] == 0 -> i++
        :: flying[i] != 0 -> break
        :: flying[i] != 0 && left > 1 -> left--; i++
        od;
        d_step {
#if TEAR
            if
            :: cell[i] != TORN -> GHOST(cell[i] == CLEAR); cell[i] = TORN
            :: else -> cell[i] = flying[i]; flying[i] = 0; inflight[to]--
            fi;
#else
            printf("        a vector lands at rank %d, slot %d, place %d\n", to, (i / CAP) % 3, i % CAP);
            land(to, i, flying[i]);
            flying[i] = 0;
            inflight[to]--;
#endif
            i = 0;
            left = 0
        }
       }
    od
}
#endif

#ifdef NONDET
/* Chooses what the next call is when the first rank gets to it; what nobody can still refer to is forgotten. */
proctype program() {
    byte next;
end:
    do
    :: atomic { next != NONE && (ready[0] == next || ready[1] == next || ready[RANKS - 1] == next) ->
        if
        :: shape[next] = SHAPE_A
        :: shape[next] = SHAPE_B
#ifdef SHAPE_C
        :: shape[next] = SHAPE_C
#endif
        fi;
        shape[(next + 2) % CALLS] = NONE;
#ifdef FOREVER
        next = (next + 1) % CALLS
#else
        next = (next + 1 < CALLS -> next + 1 : NONE)
#endif
       }
    od
}
#endif

#if FAULT
/* Tells other ranks of a fault. */
proctype tell() {
end:
    do
#ifdef BREAK_LATE_MARK
    :: d_step { marking[0] -> marking[0] = false; broken[0] = true;
        printf("        rank 0 is marked broken only now\n") }
#endif
    :: d_step { broken[0] && !broken[1] -> broken[1] = true }
#if RANKS > 2
    :: d_step { broken[0] && !broken[2] -> broken[2] = true }
#endif
    od
}
#endif

#ifdef BREAK_ZERO
/* A call of zero tokens that rank 0 counts as a call and the others, rightly, do not. */
proctype zero() {
    d_step { ready[0] == 1 && arrived[0] == 0 && begun[0] == 0 ->
        printf("rank 0: counts a call of no tokens, and advances the state to epoch %d\n", NEXT(epoch[0]));
        epoch[0] = NEXT(epoch[0]); dirty[0] = 0 }
}
#endif

init {
    byte i;
    atomic {
        for (i : 0 .. RANKS - 1) {
            epoch[i] = FIRST;
            run cta(i, 0, 0);
            run cta(i, 0, 1);
#if CMAX > 1
            run cta(i, 1, 0);
            run cta(i, 1, 1);
#endif
#if LINK
            run link(i);
#endif
        }
#ifdef NONDET
        run program();
#endif
#if FAULT && !defined(BREAK_UNTOLD)
        run tell();
#endif
#ifdef BREAK_ZERO
        run zero();
#endif
        i = 0
    }
}
