/*
 * When memory that is bound to a multicast may be unbound, for Spin: a store of any rank goes to all, and one to a rank
 * that is not bound loses the sender's context. README.md says more.
 *
 * A rank sends while it is here, leaves when it likes, and says so to rank 0, which passes it on. Words take as long as
 * they like. What must hold: no store meets a rank that is not bound, and in the end nobody is.
 */
#ifndef RANKS
#define RANKS 3
#endif
#ifndef SENDS
#define SENDS 2             /* stores of a rank, at most */
#endif
#ifndef WAY
#define WAY PARTS
#endif
#define PARTS 1             /* ranks close or sleep, and meet nobody */
#define MEETS 2             /* ranks recover: they meet, and rank 1 may first have to try again, as its calls do not end */
#define MAKES 3             /* a bring-up: each rank stores once and votes; rank 0 may give up waiting for the votes, and one
                               rank may be interrupted before it stores */
#ifdef DEATH                /* rank 1 may die where it is: its connection ends, and its GPU stops at any time after */
#define DIES 1
#else
#define DIES 0
#endif

#define ALL ((1 << RANKS) - 1)
#define BIT(x) (1 << (x))

byte bound = ALL;           /* whose memory is */
byte mapped = ALL;          /* who still has the multicast address */
byte said, arrived;         /* who has said that it has left; whose word has come to rank 0 */
byte heard[RANKS];          /* of whom */
byte ended, stopped;        /* whose connection has ended without a word; whose GPU runs nothing any more */
byte came, voted;           /* to the meeting; in the bring-up */
bool cannot, refused, agreed, interrupted;

inline store() {
    printf("rank %d: stores to all\n", r);
    if
    :: (bound | stopped) != ALL -> printf("    ... but one of them has unbound its memory\n")
    :: (mapped & BIT(r)) == 0 -> printf("    ... at an address that leads nowhere any more\n")
    :: else
    fi;
    assert((bound | stopped) == ALL);   /* nothing prevents that a process which dies takes its own away */
    assert(mapped & BIT(r));
}

inline unbinds() {
    printf("rank %d: unbinds\n", r);
    bound = bound & (ALL - BIT(r));
}

/* Addresses first: from here on this rank sends nothing. Then the word. */
inline leaves() {
#ifdef BREAK_WORD_FIRST
    said = said | BIT(r);
    printf("rank %d: says that it has left, while a call of it runs\n", r);
#else
    mapped = mapped & (ALL - BIT(r));
    said = said | BIT(r);
    printf("rank %d: takes its addresses away, and says that it has left\n", r);
#endif
    heard[r] = heard[r] | BIT(r);
#ifdef BREAK_AT_ONCE
    unbinds();
#endif
}

#if defined(BREAK_ONE_WORD)
#define ALL_HAVE_LEFT (heard[r] != BIT(r))
#else
#define ALL_HAVE_LEFT (heard[r] == ALL)
#endif
#ifdef BREAK_MARK
#define MARKED false
#else
#define MARKED true         /* what stands in says that the workspace is broken */
#endif
#if defined(BREAK_MEET_LATER)
#define MET true            /* unbinds as soon as its own calls have ended */
#elif defined(BREAK_FAILED)
#define MET (agreed || cannot)  /* ... or when the meeting has failed */
#else
#define MET agreed
#endif
#ifdef BREAK_VOTES
#define NONE_SENDS true     /* a bring-up that has failed is over for all */
#else
#define NONE_SENDS (voted == ALL)
#endif

active [RANKS] proctype rank() {
    byte r = _pid, sends;
    bool here = true, over, replays = true;

    do
#if WAY == MAKES
    :: d_step { here && !(voted & BIT(r)) && sends == 0 -> store(); sends = 1 }
    :: d_step { here && sends == 1 && !(voted & BIT(r)) -> printf("rank %d: votes\n", r); voted = voted | BIT(r) }
    :: d_step { r == 0 && !refused && !agreed && voted == ALL -> printf("rank 0: all have voted\n"); agreed = true }
    :: d_step { r == 0 && !refused && !agreed -> printf("rank 0: gives up\n"); refused = true }
    :: d_step { here && refused && (sends == 1 && (voted & BIT(r))) ->    /* hears of it where it waits for the verdict */
        here = false;
        if
        :: NONE_SENDS -> mapped = mapped & (ALL - BIT(r)); heard[r] = ALL; said = said | BIT(r)
        :: else -> leaves()
        fi
       }
    :: d_step { here && sends == 0 && !interrupted ->
        printf("rank %d: is interrupted before it stores\n", r);
        interrupted = true; here = false; leaves();
#ifdef BREAK_UNEXPOSED  /* it takes nobody to be there before it knows that all have voted to store */
        unbinds(); over = true
#endif
       }
    :: d_step { here && agreed -> here = false; leaves() }                   /* ... is used, and closed */
#else
    :: d_step { here && sends < SENDS && (stopped & BIT(r)) == 0 -> store(); sends++ }
#endif
#if WAY == PARTS
    :: d_step { here && (ended & BIT(r)) == 0 -> here = false; leaves() }
#ifdef BREAK_WORD_FIRST
    :: d_step { !here && sends < SENDS -> store(); sends++ }
    :: d_step { !here && (mapped & BIT(r)) -> mapped = mapped & (ALL - BIT(r)); sends = SENDS }
#endif
    :: d_step { !here && replays ->                             /* a graph that outlives its workspace, or its sleep */
        replays = false;
        if
        :: MARKED
        :: else -> printf("rank %d: a graph is replayed\n", r); store()
        fi
       }
#endif
#if WAY == MEETS
    :: d_step { here -> here = false; leaves(); came = came | BIT(r) }      /* has ended its calls, and comes */
    :: d_step { here && r == 1 && !cannot ->
        printf("rank 1: cannot end its calls, so the meeting fails; it goes on\n");
        cannot = true
       }
    :: d_step { r == 0 && came == ALL && !agreed -> printf("rank 0: all have come\n"); agreed = true }
    :: d_step { !here && !over && MET -> over = true; unbinds() }
#endif
    :: d_step { !here && !over && ALL_HAVE_LEFT -> over = true; unbinds() }
    :: over -> break
    :: (stopped & BIT(r)) != 0 -> break
    od
}

/* The words on their way: to rank 0, and from there to the others. */
active proctype words() {
    byte q, r;
end:
    do
    :: d_step { (said & (ALL - arrived)) != 0 ->
        q = 0;
        do
        :: (said & (ALL - arrived) & BIT(q)) == 0 -> q++
        :: else -> break
        od;
        arrived = arrived | BIT(q);
        heard[0] = heard[0] | BIT(q)
       }
    :: d_step { (heard[1] | arrived) != heard[1] -> heard[1] = heard[1] | arrived }
    :: d_step { (heard[2] | arrived) != heard[2] -> heard[2] = heard[2] | arrived }
    od
}

#if DIES
active proctype death() {
end_alive:
    d_step { (said & 2) == 0 -> ended = 2; printf("rank 1: its connection ends without a word\n") };
#ifdef BREAK_NO_PAUSE
    d_step { said = said | 2 };
#endif
    d_step { stopped = 2; bound = bound & (ALL - 2); printf("rank 1: its GPU has stopped\n") };
    d_step { said = said | 2; printf("        ... and a while has passed\n") }
}
#endif

/* Nothing is left. */
active proctype last() {
    bound == 0
}
