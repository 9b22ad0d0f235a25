// OpenMP's runtime for regions of one dynamic or static loop, in threads that the thread sanitizer sees; the compiler's own it does not
#include <pthread.h>
typedef struct { void (*f)(void*); void *data; long next, end, step, begun; pthread_mutex_t lock; int n; } Team;
typedef struct { Team *team; int id; } Member;
static _Thread_local Member me;
static void *omp_member(void *m) { me = *(Member*)m; me.team->f(me.team->data); return 0; }
void GOMP_parallel(void (*f)(void*), void *data, unsigned n, unsigned flags) {
  Team team = {.f=f, .data=data, .lock=PTHREAD_MUTEX_INITIALIZER, .n=n ? n : 1};
  pthread_t t[64]; Member m[64];
  for (int i=0; i<team.n; i++) { m[i] = (Member){&team, i}; pthread_create(t+i, 0, omp_member, m+i); }
  for (int i=0; i<team.n; i++) pthread_join(t[i], 0);
}
char GOMP_loop_nonmonotonic_dynamic_next(long *a, long *b) {
  pthread_mutex_lock(&me.team->lock);
  *a = me.team->next; *b = me.team->next += me.team->step;
  pthread_mutex_unlock(&me.team->lock);
  return *a<me.team->end;
}
char GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *a, long *b) {
  pthread_mutex_lock(&me.team->lock);
  if (!me.team->begun) { me.team->next = start; me.team->end = end; me.team->step = step*chunk; me.team->begun = 1; }
  pthread_mutex_unlock(&me.team->lock);
  return GOMP_loop_nonmonotonic_dynamic_next(a, b);
}
void GOMP_loop_end_nowait(void) {}
int omp_get_num_threads(void) { return me.team->n; }
int omp_get_thread_num(void) { return me.id; }
