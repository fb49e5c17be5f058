/*
 * Who is named when a call waits for a peer that does not come, while the next call waits for that call, for Spin. The
 * kernel between the two never waits, so the next call starts early and its wait may begin first: it must not say that
 * two calls of ours overlap. README.md says more.
 *
 * A process is one CTA of one of two calls of a rank. Data are left out: what counts is who gives up first, and what
 * the rank's one record then says. Time is a count of ticks; a CTA that may go on does so before LATE ticks have passed.
 */
#ifndef CTAS
#define CTAS 2              /* of each call */
#endif
#ifndef DEADLINE
#define DEADLINE 4          /* ticks that a call waits */
#endif
#ifndef PATIENCE
#define PATIENCE 2          /* deadlines that a call waits for the one before it */
#endif
#ifndef LATE
#define LATE 1
#endif
#ifndef COMES
#define COMES 255           /* the tick by which the peer's data have come; 255: never */
#endif
#ifndef SAYS
#define SAYS PEER           /* what the record must say in the end */
#endif

#define NONE    0           /* what a record says, and a mark */
#define PEER    1           /* a peer did not come */
#define OVERLAP 2           /* the call before this one did not end */
#define TOLD    3           /* the workspace was marked already */

byte now, record, broken;
bool claimed, here;         /* somebody fills the record; the peer's data have come */
byte triggered, finished, ended;
byte slack[2 * CTAS];       /* ticks since a CTA has last gone on */

#ifdef STUCK                /* a CTA of the first call that has triggered stops for ever, for reasons of its own */
#define STOPS (k == 0 && c == 0)
#define ALL (2 * CTAS - 1)
#else
#define STOPS false
#define ALL (2 * CTAS)
#endif
#define LOOKS slack[k * CTAS + c] = 0
#define LEAVES slack[k * CTAS + c] = 255
#define WAITED (now - began)

proctype cta(byte k; byte c) {
    byte began, code;
    byte stage;             /* 0 not started, 1 entered, 2 waits for the peer, 3 reports, 4 records, 5 marks, 6 finishes */
    bool waits;

#ifdef STUCK
end:                        /* of the one that has stopped; init still ends only when all others have */
#endif
    do
    :: d_step { stage == 0 && (k == 0 || triggered == CTAS) ->
        printf("call %d CTA %d: starts, at tick %d\n", k, c, now);
        stage = 1;
        LOOKS
       }
    /* The call before must have finished. */
    :: d_step { stage == 1 && (k == 0 || finished >= CTAS || broken) ->
        if
        :: broken -> code = TOLD; stage = 3
        :: else ->
            stage = 2;
            triggered = triggered + (k == 0 -> 1 : 0)
        fi;
        began = 0;
        waits = false;
        LOOKS;
        if
        :: STOPS -> LEAVES
        :: else
        fi
       }
    :: d_step { stage == 1 && k != 0 && finished < CTAS && !broken ->
        if
        :: !waits ->
            printf("call %d CTA %d: begins to wait for the call before, at tick %d\n", k, c, now);
            waits = true;
            began = now
        :: waits && WAITED >= PATIENCE * DEADLINE ->
            printf("call %d CTA %d: gives up on the call before, at tick %d\n", k, c, now);
            code = OVERLAP;
            stage = 3
        :: else
        fi;
        LOOKS
       }
    /* The peer's data. */
    :: d_step { stage == 2 && !(STOPS) ->
        if
        :: here -> stage = 6
        :: !here && !waits ->
            printf("call %d CTA %d: begins to wait for the peer, at tick %d\n", k, c, now);
            waits = true;
            began = now
        :: !here && waits && broken -> code = TOLD; stage = 3
        :: !here && waits && !broken && WAITED >= DEADLINE ->
            printf("call %d CTA %d: gives up on the peer, at tick %d\n", k, c, now);
            code = PEER;
            stage = 3
        :: else
        fi;
        LOOKS
       }
    :: d_step { stage == 3 ->
        if
#ifndef UNCLAIMED
        :: claimed -> stage = 6
        :: !claimed -> claimed = true; stage = 4
#else
        :: stage = 4
#endif
        fi;
        LOOKS
       }
    :: d_step { stage == 4 ->
        record = code;
        printf("call %d CTA %d: records %d, at tick %d\n", k, c, code, now);
        stage = 5;
        LOOKS
       }
    :: d_step { stage == 5 ->
        if
        :: !broken -> broken = code
        :: else
        fi;
        stage = 6;
        LOOKS
       }
    :: d_step { stage == 6 ->
        finished++;
        ended++;
        stage = 7;
        LEAVES
       }
    :: stage == 7 -> break
    od
}

/* A CTA that may go on is never more than LATE ticks behind. */
#define BEHIND(i) (slack[i] != 255 && slack[i] >= LATE && ((i) < CTAS || triggered == CTAS))

proctype clock() {
    byte i;
    bool behind;
    do
    :: d_step { ended < ALL && (here || now < COMES) ->
        behind = false;
        for (i : 0 .. 2 * CTAS - 1) { behind = behind || BEHIND(i) };
        i = 0;
        if
        :: !behind ->
            now++;
            for (i : 0 .. 2 * CTAS - 1) {
                slack[i] = (slack[i] == 255 || slack[i] >= LATE -> slack[i] : slack[i] + 1)
            }
        :: else
        fi;
        i = 0;
        behind = false
       }
    :: ended == ALL -> break
    od
}

#if COMES < 255
proctype peer() { here = true }
#endif

init {
    byte k, c;
    atomic {
        for (k : 0 .. 1) {
            for (c : 0 .. CTAS - 1) { run cta(k, c) }
        }
        run clock();
#if COMES < 255
        run peer();
#endif
        k = 0;
        c = 0
    };
    d_step { ended == ALL ->
        assert(record == SAYS)
    }
}
