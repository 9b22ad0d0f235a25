// Linear attention, its hybrid with a softmax window, the Hedgehog map and the loss that distils it, for CPUs.
// The page kernels/10_cpu shows this file region by region, and tests each.
// float throughout. Matrices have rows of a multiple of 16 numbers, filled up with zeros (`round_up16`).

// region: vectors
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
enum {VL=16, MR=8, NR=2}; // numbers of a vector; rows and vectors of a tile
#elif defined(__AVX__)
enum {VL=8, MR=4, NR=2};
#else
enum {VL=4, MR=8, NR=2};
#endif
typedef float vec __attribute__((vector_size(4*VL), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4*VL), aligned(4), may_alias));
#define V(p) (*(vec*)(p))
#define INLINE static inline __attribute__((always_inline))
static long round_up16(long n) { return (n+15)/16*16; }
static long tiles(long n) { return (n+MR-1)/MR*MR; } // rows of whole tiles
static long least(long a, long b) { return a<b ? a : b; }
INLINE vec pick(ivec m, vec a, vec b) { return (vec)((m & (ivec)a) | (~m & (ivec)b)); }
#if defined(__AVX512F__) // where a is NaN they give b, as `pick` does
#include <immintrin.h>
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vec larger(vec a, vec b) { return pick(a>b, a, b); }
INLINE vec smaller(vec a, vec b) { return pick(a<b, a, b); }
#endif
// Across a vector, by halves: each half is laid over the other
#define MIX __builtin_shufflevector
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__>=12)
#define ACROSS(of) \
  x = of(x, MIX(x,x,8,9,10,11,12,13,14,15,0,1,2,3,4,5,6,7)); x = of(x, MIX(x,x,4,5,6,7,0,1,2,3,12,13,14,15,8,9,10,11)); \
  x = of(x, MIX(x,x,2,3,0,1,6,7,4,5,10,11,8,9,14,15,12,13)); x = of(x, MIX(x,x,1,0,3,2,5,4,7,6,9,8,11,10,13,12,15,14)); return x[0];
#else
#define ACROSS(of) for (int n=VL/2; n; n/=2) { vec y = x; for (int i=0; i<n; i++) y[i] = x[i+n]; x = of(x, y); } return x[0];
#endif
INLINE vec added(vec a, vec b) { return a+b; }
INLINE float sum_v(vec x) { ACROSS(added) }
INLINE float max_v(vec x) { ACROSS(larger) }
// endregion

// region: product
INLINE void tile(int nr, long K, const float *a, long ai, long ak, const float *b, long lb, float *c, long lc, int add) {
  vec s[MR][NR];
  for (int i=0; i<MR; i++) for (int j=0; j<nr; j++) s[i][j] = add ? V(c+i*lc+j*VL) : (vec){0};
  for (long k=0; k<K; k++) {
    vec x[NR];
    for (int j=0; j<nr; j++) x[j] = V(b+k*lb+j*VL);
    for (int i=0; i<MR; i++) for (int j=0; j<nr; j++) s[i][j] += x[j]*a[i*ai+k*ak];
  }
  for (int i=0; i<MR; i++) for (int j=0; j<nr; j++) V(c+i*lc+j*VL) = s[i][j];
}

// c (M, N) = a (M, K) b (K, N), added to c if `add`; rows and columns of a lie ai and ak apart
void product(long M, long N, long K, const float *a, long ai, long ak, const float *b, long lb, float *c, long lc, long add) {
  long j = 0;
  for (; j+NR*VL<=N; j+=NR*VL) for (long i=0; i<M; i+=MR) tile(NR, K, a+i*ai, ai, ak, b+j, lb, c+i*lc+j, lc, add);
  for (; j<N; j+=VL) for (long i=0; i<M; i+=MR) tile(1, K, a+i*ai, ai, ak, b+j, lb, c+i*lc+j, lc, add);
}
// endregion

// region: transpose
#if defined(__clang__) || __GNUC__>=12
typedef float oct __attribute__((vector_size(32), aligned(4), may_alias));
INLINE void transpose8x8(const float *a, long la, float *b, long lb) { // 8 × 8, in registers
  oct r[8], t[8];
  for (int i=0; i<8; i++) r[i] = *(oct*)(a+i*la);
  for (int i=0; i<8; i+=2) { t[i] = MIX(r[i],r[i+1],0,8,1,9,4,12,5,13); t[i+1] = MIX(r[i],r[i+1],2,10,3,11,6,14,7,15); }
  for (int i=0; i<8; i+=4) for (int j=0; j<2; j++) {
    r[i+2*j] = MIX(t[i+j],t[i+j+2],0,1,8,9,4,5,12,13); r[i+2*j+1] = MIX(t[i+j],t[i+j+2],2,3,10,11,6,7,14,15);
  }
  for (int i=0; i<4; i++) {
    *(oct*)(b+i*lb) = MIX(r[i],r[i+4],0,1,2,3,8,9,10,11); *(oct*)(b+(i+4)*lb) = MIX(r[i],r[i+4],4,5,6,7,12,13,14,15);
  }
}
#else
INLINE void transpose8x8(const float *a, long la, float *b, long lb) { for (int i=0; i<8; i++) for (int j=0; j<8; j++) b[j*lb+i] = a[i*la+j]; }
#endif
// b (N, M) = a (M, N) transposed
void transpose(const float *a, long la, long M, long N, float *b, long lb) {
  for (long j=0; j<N; j+=8) for (long i=0; i<M; i+=8) transpose8x8(a+i*la+j, la, b+j*lb+i, lb);
}
// endregion

// region: exp
INLINE vec exp_v(vec x) { // for x of 0 or less
  x = larger((vec){0}-87.f, x);
  vec n = x*1.44269504f + 12582912.f;
  ivec e = (ivec)n;
  n -= 12582912.f;
  vec r = (x - n*0.693359375f) + n*2.12194440e-4f, p = r*1.9875691500e-4f + 1.3981999507e-3f;
  p = p*r + 8.3334519073e-3f; p = p*r + 4.1665795894e-2f; p = p*r + 1.6666665459e-1f; p = p*r + 5.0000001201e-1f;
  return (p*r*r + r + 1.f) * (vec)((e+127) << 23);
}
// A weight from its logarithm, 0 or less; below -87 it is 0
INLINE vec weight_v(vec x) { return pick(x < (vec){0}-87.f, (vec){0}, exp_v(smaller((vec){0}, x))); }
static float weight(float x) { return x<-87.f ? 0.f : expf(x); }
void exp_all(float *x, long n) { for (long i=0; i<n; i+=VL) V(x+i) = exp_v(V(x+i)); }
// endregion

// region: log
INLINE vec log_v(vec x) {
  ivec i = (ivec)x, e = (i>>23) - 126;
  vec m = (vec)((i & 0x7fffff) | 0x3f000000), y;
  ivec low = m < (vec){0}+.707106781f;
  e += low;
  m += (vec)(low & (ivec)m) - 1.f;
  y = m*7.0376836292e-2f - 1.1514610310e-1f; y = y*m + 1.1676998740e-1f; y = y*m - 1.2420140846e-1f; y = y*m + 1.4249322787e-1f;
  y = y*m - 1.6668057665e-1f; y = y*m + 2.0000714765e-1f; y = y*m - 2.4999993993e-1f; y = y*m + 3.3333331174e-1f;
  vec n = __builtin_convertvector(e, vec), z = m*m;
  return (m + (y*m*z - n*2.12194440e-4f - z*.5f)) + n*.693359375f;
}
void log_all(float *x, long n) { for (long i=0; i<n; i+=VL) V(x+i) = log_v(V(x+i)); }
// endregion

// region: features
enum {FEATURES, HALVES, JOINT, EXP}; // forms of the map; FEATURES: no map, the inputs are features already
#define LOG_ZERO -1e30f              // log weight of a key that is not there

// phi (m, 2E) of y (m, E), of which e columns count; for EXP divided by exp(log), which goes to `l` where that is wanted.
// 16 rows at a time: the extremes of all, then all exponentials, so that none waits for those of its own row
void features(const float *y, long m, long e, long E, long form, float *phi, float *l) {
  float c = form==JOINT ? 2 : 1, top[16], low[16];
  for (long t0=0; t0<m; t0+=16) {
    long end = m-t0<16 ? m : t0+16;
    for (long t=t0; t<end; t++) {
      const float *x = y+t*E;
      vec hi = (vec){0}+x[0], lo = hi;
      long i = 0;
      for (; i+VL<=e; i+=VL) { hi = larger(V(x+i), hi); lo = smaller(V(x+i), lo); }
      float a = max_v(hi), b = -max_v(-lo);
      for (; i<e; i++) { a = x[i]>a ? x[i] : a; b = x[i]<b ? x[i] : b; }
      if (form!=HALVES) { a = a>-b ? a : -b; b = -a; }
      top[t-t0] = a; low[t-t0] = b;
      if (form==EXP && l) l[t] = a;
    }
    for (long t=t0; t<end; t++) {
      const float *x = y+t*E;
      float *f = phi+t*2*E, a = top[t-t0], b = low[t-t0];
      if (form==EXP) for (long i=0; i<E; i+=VL) { V(f+i) = weight_v(V(x+i)-a); V(f+E+i) = weight_v(b-V(x+i)); }
      else for (long i=0; i<E; i+=VL) { V(f+i) = exp_v((V(x+i)-a)*c); V(f+E+i) = exp_v((b-V(x+i))*c); }
      for (long i=e; i<E; i++) f[i] = f[E+i] = 0;
    }
    if (form!=EXP) for (long t=t0; t<end; t++) {
      float *f = phi+t*2*E;
      vec a = {0}, b = {0};
      for (long i=0; i<E; i+=VL) { a += V(f+i); b += V(f+E+i); }
      if (form==JOINT) a = b = a+b;
      float p = 1/sum_v(a), q = form==JOINT ? p : 1/sum_v(b);
      for (long i=0; i<E; i+=VL) { V(f+i) *= p; V(f+E+i) *= q; }
    }
  }
}

// dy (m, E) from phi and its gradient g (m, 2E)
void features_back(const float *phi, const float *g, long m, long E, long form, float *dy) {
  float c = form==JOINT ? 2 : 1;
  for (long t=0; t<m; t++, dy+=E, phi+=2*E, g+=2*E) {
    vec a = {0}, b = {0};
    if (form!=EXP) for (long i=0; i<E; i+=VL) { a += V(phi+i)*V(g+i); b += V(phi+E+i)*V(g+E+i); }
    float p = sum_v(a), q = sum_v(b);
    if (form==JOINT) p = q = p+q;
    for (long i=0; i<E; i+=VL) V(dy+i) = (V(phi+i)*(V(g+i)-p) - V(phi+E+i)*(V(g+E+i)-q))*c;
  }
}
// endregion

// region: records
enum {C=64}; // tokens of a chunk
typedef struct { // sizes of a call; Python reads the names here
  int64_t threads, parts, each, // each sequence is cut in `parts`; a task is one part of `each` sequences of one head
    B, N, G, T, D, V, E,  // N key-value heads, G query heads for each; channels of the map's inputs (or features), of values, of the map's output
    form, causal, keep,   // of the map; see only what came before?; will a backward pass follow?
    state, direct,        // is a state given?; one chunk and no state before or after it: its weights are all there is
    logs, past, window, R, // are there log weights?; keys before the first query; keys seen by softmax, of R channels
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, gb, gh, gt, rqb, rqh, rqt, rkb, rkh, rkt; // strides of batch, head, token
} Sizes;
typedef struct { // pointers, null where there is nothing
  float *q, *k, *v, *wq, *wk, *bq, *bk, *mask, *logk, // inputs; the map's matrices and biases; (B, past+T) bytes; (B, N, past+T) log weights
    *rq, *rk, *logq, *gamma, *scale,                  // of the window: queries, keys, log weights of the queries, (H,) of the window, one number
    *S0, *z0, *m0, *o, *S, *z, *m,                    // state before, outputs, state after
    *den, *top, *states, *sums,                       // (B, H, T) normalisers and (B, N, T) largest log weights; states before each chunk; of each part
    *g, *dS, *dz,                                     // gradients of o, S, z
    *dq, *dk, *dv, *dwq, *dwk, *dbq, *dbk, *dlogk, *drq, *drk, *dlogq, *dgamma, *dS0, *dz0; // gradients of the inputs
} Data;
#define AT(x, B_, H_, T_) (d->x + (B_)*n->x##b + (H_)*n->x##h + (T_)*n->x##t)
#define KEYS (n->past+n->T)                                       // how many there are
#define QUERY(x, w) (d->x + ((b*n->T+t)*n->N*n->G+H)*(w))         // row t of head H in memory (B, T, H, w)
#define KEY(x, s, w) (d->x + ((b*KEYS+(s))*n->N+h)*(w))           // row s of head h in memory (B, past+T, N, w)
// endregion

// region: workspace
// What one thread needs for a chunk. Each buffer is declared once: its name and its size in numbers.
#define FORWARD_BUFFERS(X) \
  X(x, C*D) X(y, C*E) X(q, C*F) X(k, C*F) X(kT, F*C) X(v, C*V) X(A, C*C) X(o, C*V) X(S, F*V) X(z, F) X(m, 16) X(wq, n->G*D*E) X(wk, D*E) \
  X(l, C) X(c, C) X(e, C) X(w, C)                          /* log weights of keys; largest before a query; exp(m-c) of queries; weights of keys */
#define BACKWARD_BUFFERS(X) \
  X(vT, V*C) X(dA, C*C) X(ST, V*F) X(dS, F*V) X(dST, V*F) X(dz, F) X(g, C*V) X(gd, C) X(dphi, C*F) X(dx, C*D) X(dk, C*F) X(dv, C*V) X(W, E*D) \
  X(dw, (n->G+1)*E*(D+1))
#define WINDOW_BUFFERS(X) X(rq, C*R) X(rk, reach*R) X(rkT, R*reach) X(vb, reach*V) X(hide, reach) X(P, C*band)
#define WINDOW_BACKWARD_BUFFERS(X) X(vbT, V*reach) X(dP, C*band) X(drq, C*R) X(drk, reach*R) X(dvb, reach*V)

#define FIELD(name, size) float *name;
#define COUNT(name, size) total += round_up16(size);
#define PLACE(name, size) r.name = p; p += round_up16(size);
#define BUFFERS(X) \
  { FORWARD_BUFFERS(X) if (back) { BACKWARD_BUFFERS(X) } if (n->window) { WINDOW_BUFFERS(X) } if (n->window && back) { WINDOW_BACKWARD_BUFFERS(X) } }
typedef struct {
  long D, V, E, F, chunks, R, reach, band; // sizes filled up; saved states of a head; R channels of the keys that a chunk's windows reach, and 16 queries'
  FORWARD_BUFFERS(FIELD) BACKWARD_BUFFERS(FIELD) WINDOW_BUFFERS(FIELD) WINDOW_BACKWARD_BUFFERS(FIELD)
} Workspace;

static _Thread_local float *space;
static _Thread_local long have;
static float *floats(long n) { // memory for n numbers, which a thread keeps
  if (have<n) {
    free(space); space = aligned_alloc(64, 4*round_up16(n)); have = n;
    if (!space) { fprintf(stderr, "hedgehog_nb: no memory for %ld MiB\n", n>>18); abort(); }
  }
  return space;
}

static Workspace workspace(const Sizes *n, int back) {
  long D = round_up16(n->D), V = round_up16(n->V), E = round_up16(n->E), F = n->form ? 2*E : D, R = round_up16(n->R), band = round_up16(n->window+15), reach = C+band, total = 0;
  Workspace r = {.D=D, .V=V, .E=E, .F=F, .chunks=(n->T-1)/C+n->state, .R=R, .reach=reach, .band=band};
  BUFFERS(COUNT)
  float *p = floats(total);
  BUFFERS(PLACE)
  return r;
}
// endregion

// region: moves
// b (M, W) = a (m, w), zeros around it
static void rows_in(const float *a, long la, long m, long M, long w, float *b, long W) {
  for (long i=0; i<m; i++) { memcpy(b+i*W, a+i*la, 4*w); memset(b+i*W+w, 0, 4*(W-w)); }
  memset(b+m*W, 0, 4*W*(M-m));
}
static void rows_out(const float *a, long W, long m, long w, float *b, long lb) { for (long i=0; i<m; i++) memcpy(b+i*lb, a+i*W, 4*w); }
static void rows_add(const float *a, long W, long m, long w, float *b, long lb) { for (long i=0; i<m; i++) for (long j=0; j<w; j++) b[i*lb+j] += a[i*W+j]; }
static void scale_row(float *a, long W, float by) { for (long j=0; j<W; j+=VL) V(a+j) *= by; }
static float dot_row(const float *a, const float *b, long W) { vec s = {0}; for (long j=0; j<W; j+=VL) s += V(a+j)*V(b+j); return sum_v(s); }

// A state has F rows, the plus half and the minus half one after the other; in the workspace each half is padded
static long width(const Sizes *n) { return n->form ? 2*n->E : n->D; }
static long row(const Sizes *n, const Workspace *r, long i) { return n->form && i>=n->E ? i-n->E+r->E : i; }
static void state_in(const Sizes *n, const Workspace *r, const float *S, const float *z, long head, float *to, float *tz) {
  memset(to, 0, 4*r->F*r->V); memset(tz, 0, 4*r->F);
  if (S) for (long f=width(n), i=0; i<f; i++) { memcpy(to+row(n,r,i)*r->V, S+(head*f+i)*n->V, 4*n->V); tz[row(n,r,i)] = z[head*f+i]; }
}
static void state_out(const Sizes *n, const Workspace *r, const float *S, const float *z, float *to, float *tz, long head) {
  for (long f=width(n), i=0; i<f; i++) { memcpy(to+(head*f+i)*n->V, S+row(n,r,i)*r->V, 4*n->V); tz[head*f+i] = z[row(n,r,i)]; }
}
static void save(const Workspace *r, const float *S, const float *z, float m, float *to) {
  long n = r->F*r->V;
  memcpy(to, S, 4*n); memcpy(to+n, z, 4*r->F); memset(to+n+r->F, 0, 4*16); to[n+r->F] = m;
}
static float load(const Workspace *r, const float *from, float *S, float *z) {
  memcpy(S, from, 4*r->F*r->V); memcpy(z, from+r->F*r->V, 4*r->F);
  return from[r->F*(r->V+1)];
}
#define SAVED (r->F*(r->V+1)+16) // numbers of a saved state: S, z and m
static void scale_state(const Workspace *r, float *S, float *z, float by) { if (by!=1) { scale_row(S, r->F*r->V, by); scale_row(z, r->F, by); } }
static float no_keys(const Sizes *n) { return n->logs ? LOG_ZERO : 0; } // m of a state that has seen nothing
// endregion

// region: chunk
static void weights_in(const Sizes *n, const Data *d, const Workspace *r, long h) { // W transposed, so that the map is a product
  long E = r->E, D = r->D, e = n->E, c = n->D;
  if (n->form) for (long g=0; g<=n->G; g++) {
    const float *w = g<n->G ? d->wq+(h*n->G+g)*e*c : d->wk+h*e*c;
    float *to = g<n->G ? r->wq+g*D*E : r->wk;
    if (e%8==0 && c%8==0) transpose(w, c, e, c, to, E);
    else for (long i=0; i<e; i++) for (long j=0; j<c; j++) to[j*E+i] = w[i*c+j];
    for (long j=0; j<c; j++) memset(to+j*E+e, 0, 4*(E-e));
  }
}

// Features phi (M, F) of the rows a (m, D), zeros below; log weights to l where the form has them
static void map(const Sizes *n, const Workspace *r, const float *a, long la, long m, long M, const float *w, const float *b, float *phi, float *l) {
  if (!n->form) { rows_in(a, la, m, M, n->D, phi, r->D); return; }
  if (m%MR) { rows_in(a, la, m, tiles(m), n->D, r->x, r->D); a = r->x; la = r->D; }
  product(tiles(m), r->E, n->D, a, la, 1, w, r->E, r->y, r->E, 0);
  if (b) for (long i=0; i<m; i++) for (long e=0; e<n->E; e++) r->y[i*r->E+e] += b[e];
  features(r->y, m, n->E, r->E, n->form, phi, l);
  memset(phi+m*r->F, 0, 4*r->F*(M-m));
}

static long first_key(const Sizes *n, long t) { return t+n->past-n->window; } // the oldest that leaves the window at query t; below 0 there is none
static long missing(const Sizes *n, long t, long m) { long s = first_key(n, t); return s>=0 ? 0 : -s<m ? -s : m; }

// Keys and values that the queries t to t+m add to the state, one after another
static void keys(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long t, long m) {
  long none = missing(n, t, m), s = first_key(n, t)+none, M = round_up16(m);
  float *l = r->l+none;
  memset(r->k, 0, 4*r->F*none); memset(r->v, 0, 4*r->V*none);
  map(n, r, AT(k,b,h,s), n->kt, m-none, M-none, r->wk, d->bk ? d->bk+h*n->E : 0, r->k+none*r->F, l);
  rows_in(AT(v,b,h,s), n->vt, m-none, M-none, n->V, r->v+none*r->V, r->V);
  if (n->logs) {
    if (d->logk) memcpy(l, d->logk+(b*n->N+h)*KEYS+s, 4*(m-none)); else if (n->form!=EXP) memset(l, 0, 4*(m-none));
    for (long i=0; i<none; i++) r->l[i] = LOG_ZERO;
    for (long i=m; i<C; i++) r->l[i] = LOG_ZERO;
  }
  if (d->mask) for (long i=none; i<m; i++) if (!((uint8_t*)d->mask)[b*KEYS+s+i-none]) { memset(r->k+i*r->F, 0, 4*r->F); if (n->logs) r->l[i] = LOG_ZERO; }
  transpose(r->k, r->F, M, r->F, r->kT, C);
}

// With log weights, what is seen before query i is measured by the largest of them, c_i; e_i brings the state before the chunk, of m, to it
static float largest(const Sizes *n, const Workspace *r, float m, long rows) { // returns that after the chunk
  for (long i=0; i<rows; i++) { r->c[i] = i ? r->c[i-1] : m; if (r->l[i]>r->c[i]) r->c[i] = r->l[i]; }
  if (!n->causal) for (long i=0; i<rows; i++) r->c[i] = r->c[rows-1];
  for (long i=0; i<rows; i++) r->e[i] = weight(m-r->c[i]);
  return r->c[rows-1];
}
static int inside(const Sizes *n) { return n->causal || n->direct; } // do queries meet the keys of their own chunk one by one?
static long met(const Sizes *n, long i, long m) { return n->causal ? least(i+16, m) : m; } // keys of a chunk of m that queries i to i+16 meet
static void triangle(float *A, long M) { for (long i=0; i<M; i++) memset(A+i*C+i+1, 0, 4*(round_up16(i+1)-i-1)); }
static void weigh(const Sizes *n, const Workspace *r, float *A, float *A2, long m) { // row i times exp(l_j - c_i); of A2 too
  for (long i=0, had=0; i<m; i++) { // `had`: keys whose weights are there
    long end = n->causal ? round_up16(i+1) : round_up16(m), j = i && r->c[i]==r->c[i-1] ? had : 0;
    for (; j<end; j+=VL) V(r->w+j) = weight_v(V(r->l+j)-r->c[i]);
    for (j=0; j<end; j+=VL) { V(A+i*C+j) *= V(r->w+j); if (A2) V(A2+i*C+j) *= V(r->w+j); }
    had = end;
  }
}
// endregion

// region: near
// Raw keys and values that the window of some query t to t+m reaches; scaled, and with what is to be added to the score of one that is not there
static void near_keys(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long t, long m, int back) {
  long s = first_key(n, t)+1, R = r->R, L = r->reach, V_ = r->V;
  for (long i=0; i<L; i++) {
    int there = s+i>=0 && i<m+n->window-1 && (!d->mask || ((uint8_t*)d->mask)[b*KEYS+s+i]);
    r->hide[i] = there ? 0 : LOG_ZERO;
    memset(r->rk+i*R, 0, 4*R); memset(r->vb+i*V_, 0, 4*V_);
    if (!there) continue;
    const float *k = AT(rk,b,h,s+i);
    for (long j=0; j<n->R; j++) r->rk[i*R+j] = k[j]**d->scale;
    memcpy(r->vb+i*V_, AT(v,b,h,s+i), 4*n->V);
  }
  transpose(r->rk, R, L, R, r->rkT, L);
  if (back) transpose(r->vb, V_, L, V_, r->vbT, L);
}

// Weights P of the window, relative to the largest score or log weight of all that query i sees, which goes to near[i]
static void near_weights(const Sizes *n, const Data *d, const Workspace *r, long b, long H, long t, long m, float *near) {
  long M = round_up16(m), W = r->band, w = n->window;
  float gamma = d->gamma ? d->gamma[H] : 0;
  rows_in(AT(rq,b,H,t), n->rqt, m, M, n->R, r->rq, r->R);
  for (long i0=0; i0<M; i0+=16) {
    product(16, W, r->R, r->rq+i0*r->R, r->R, 1, r->rkT+i0, r->reach, r->P+i0*W, W, 0);
    for (long i=i0; i<i0+16; i++) {
      float *p = r->P+i*W;
      if (i>=m) { memset(p, 0, 4*W); continue; }
      for (long j=0; j<W; j+=VL) V(p+j) += V(r->hide+i0+j)+gamma;
      for (long j=0; j<i-i0; j++) p[j] = LOG_ZERO;
      for (long j=i-i0+w; j<W; j++) p[j] = LOG_ZERO;
      vec most = V(p);
      for (long j=VL; j<W; j+=VL) most = pick(V(p+j)>most, V(p+j), most);
      float top = max_v(most), far = r->c[i] + (d->logq ? d->logq[(b*n->N*n->G+H)*n->T+t+i] : 0);
      if (top<LOG_ZERO/2) { memset(p, 0, 4*W); near[i] = far; continue; }
      near[i] = top>far ? top : far;
      for (long j=0; j<W; j+=VL) V(p+j) = weight_v(V(p+j)-near[i]);
    }
  }
}
static float far_weight(const Sizes *n, const Data *d, const Workspace *r, long b, long H, long t, long i, float near) { // of what is older than the window
  return weight(r->c[i] + (d->logq ? d->logq[(b*n->N*n->G+H)*n->T+t+i] : 0) - near);
}
// endregion

// region: forward
// `past`: is there a state to be read?
static void outputs(const Sizes *n, const Data *d, const Workspace *r, long b, long H, const float *w, long t, long m, int past) {
  long M = round_up16(m), rows = tiles(m), F = r->F, W = r->V;
  float den[C], near[C];
  int weighed = n->logs && inside(n);
  map(n, r, AT(q,b,H,t), n->qt, m, M, w, d->bq ? d->bq+H*n->E : 0, r->q, 0);
  for (long i=0; i<m; i++) den[i] = past ? dot_row(r->q+i*F, r->z, F) : 0;
  if (past && (weighed || !inside(n))) product(rows, W, F, r->q, F, 1, r->S, W, r->o, W, 0);
  if (past && weighed) for (long i=0; i<m; i++) { scale_row(r->o+i*W, W, r->e[i]); den[i] *= r->e[i]; }
  if (inside(n)) {
    for (long i=0; i<m; i+=16) product(least(16, rows-i), round_up16(met(n, i, m)), F, r->q+i*F, F, 1, r->kT, C, r->A+i*C, C, 0);
    if (weighed) weigh(n, r, r->A, 0, m);
    if (n->causal) triangle(r->A, rows);
    for (long i=0; i<m; i+=16) product(least(16, rows-i), W, met(n, i, m), r->A+i*C, C, 1, r->v, W, r->o+i*W, W, past && weighed);
    if (past && !weighed) product(rows, W, F, r->q, F, 1, r->S, W, r->o, W, 1);
    for (long i=0; i<m; i++) { vec s = {0}; for (long j=0; j<met(n, i/16*16, m); j+=VL) s += V(r->A+i*C+j); den[i] += sum_v(s); }
  }
  if (n->window) {
    near_weights(n, d, r, b, H, t, m, near);
    for (long i=0; i<m; i++) { float f = far_weight(n, d, r, b, H, t, i, near[i]); scale_row(r->o+i*W, W, f); den[i] *= f; }
    for (long i=0; i<M; i+=16) product(16, W, r->band, r->P+i*r->band, r->band, 1, r->vb+i*W, W, r->o+i*W, W, 1);
    for (long i=0; i<m; i++) { vec s = {0}; for (long j=0; j<r->band; j+=VL) s += V(r->P+i*r->band+j); den[i] += sum_v(s); }
  }

  for (long i=0; i<m; i++) {
    float x = fabsf(den[i])<=1e-30f ? 1e-30f : den[i], *to = AT(o,b,H,t+i), *res = W==n->V ? to : r->o+i*W;
    if (d->den) d->den[(b*n->N*n->G+H)*n->T+t+i] = x;
    for (long j=0; j<W; j+=VL) V(res+j) = V(r->o+i*W+j)*(1/x);
    if (res!=to) memcpy(to, res, 4*n->V);
  }
}

static void add_keys(const Sizes *n, const Workspace *r, long m, float after) { // of log weights relative to `after`
  if (n->logs) {
    scale_state(r, r->S, r->z, weight(*r->m-after));
    for (long j=0; j<round_up16(m); j+=VL) V(r->w+j) = weight_v(V(r->l+j)-after);
    for (long f=0; f<r->F; f++) for (long j=0; j<round_up16(m); j+=VL) V(r->kT+f*C+j) *= V(r->w+j);
    *r->m = after;
  }
  product(r->F, r->V, round_up16(m), r->kT, C, 1, r->v, r->V, r->S, r->V, 1);
  for (long f=0; f<r->F; f++) { vec s = {0}; for (long j=0; j<round_up16(m); j+=VL) s += V(r->kT+f*C+j); r->z[f] += sum_v(s); }
}

static long split_start(const Sizes *n, long p) { long x = (n->T+C-1)/C*p/n->parts*C; return x<n->T ? x : n->T; } // first token of a part
static float *sums_at(const Sizes *n, const Data *d, const Workspace *r, long head, long p) { return d->sums+(head*n->parts+p)*SAVED; }

static void add_part(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p) {
  for (long t=split_start(n,p), end=split_start(n,p+1); t<end; t+=C) {
    long m = end-t<C ? end-t : C;
    keys(n, d, r, b, h, t, m);
    add_keys(n, r, m, n->logs ? largest(n, r, *r->m, m) : 0);
  }
}
static void sum_part(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p) {
  memset(r->S, 0, 4*r->F*r->V); memset(r->z, 0, 4*r->F); *r->m = no_keys(n);
  add_part(n, d, r, b, h, p);
  save(r, r->S, r->z, *r->m, sums_at(n, d, r, b*n->N+h, p));
}

// From what each part adds to the state before it, or behind it (`back`: of gradients, each relative to the m before its part, which only falls)
static void scan_splits(const Sizes *n, const Data *d, long head, const float *S0, const float *z0, float m, float *S, float *z, int back) {
  Workspace all = workspace(n, 0), *r = &all;
  state_in(n, r, S0, z0, head, r->S, r->z);
  for (long i=0; i<n->parts; i++) {
    float *x = sums_at(n, d, r, head, back ? n->parts-1-i : i), *y = x+r->F*r->V, own = x[SAVED-16], after = back || own>m ? own : m;
    float keep = n->logs ? weight(back ? after-m : m-after) : 1, add = n->logs && !back ? weight(own-after) : 1;
    for (long j=0; j<r->F*r->V; j++) { float was = r->S[j]; r->S[j] = was*keep+x[j]*add; x[j] = was; }
    for (long j=0; j<r->F; j++) { float was = r->z[j]; r->z[j] = was*keep+y[j]*add; y[j] = was; }
    x[SAVED-16] = m; m = after;
  }
  if (!n->causal) for (long p=0; p<n->parts; p++) save(r, r->S, r->z, m, sums_at(n, d, r, head, p));
  if (back && !n->causal && n->logs && d->m0) scale_state(r, r->S, r->z, weight(d->m0[head]-m)); // what was before is part of a state of this m
  if (S) state_out(n, r, r->S, r->z, S, z, head);
  if (!back) d->m[head] = m;
}

// The saved state before the chunk at t; where none was given there is none before the first
static float *saved(const Sizes *n, const Data *d, const Workspace *r, long head, long t) { return d->states+(head*r->chunks+t/C-!n->state)*SAVED; }

static void forward_part(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p) {
  long head = b*n->N+h, begins = split_start(n,p), ends = split_start(n,p+1);
  *r->m = d->m0 ? d->m0[head] : no_keys(n);
  if (n->parts>1) *r->m = load(r, sums_at(n, d, r, head, p), r->S, r->z);
  else if (!n->direct) state_in(n, r, d->S0, d->z0, head, r->S, r->z);
  if (n->parts==1 && !inside(n)) add_part(n, d, r, b, h, p);
  for (long t=begins; t<ends; t+=C) {
    long m = ends-t<C ? ends-t : C;
    float after = *r->m;
    int past = n->state || t || !inside(n);
    if (n->keep && n->causal && past) save(r, r->S, r->z, *r->m, saved(n, d, r, head, t));
    if (inside(n)) {
      keys(n, d, r, b, h, t, m);
      if (n->logs) after = largest(n, r, *r->m, m);
      if (n->logs && n->keep && n->causal) memcpy(d->top+head*n->T+t, r->c, 4*m);
    }
    if (n->window) near_keys(n, d, r, b, h, t, m, 0);
    for (long g=0; g<n->G; g++) outputs(n, d, r, b, h*n->G+g, r->wq+g*r->D*r->E, t, m, past);
    if (n->causal && (d->S || t+C<ends)) add_keys(n, r, m, after); // a state that nobody reads is not made
    *r->m = after;
  }
  if (n->parts==1) d->m[head] = *r->m;
  if (n->parts==1 && d->S) state_out(n, r, r->S, r->z, d->S, d->z, head);
}

// One part of `each` sequences of a head is a task: a head's matrices are prepared once for all, and their gradients, of the query heads and of the keys
// from number `first` to `last`, summed over them
typedef void Part(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p);
static void weights_out(const Sizes *n, const Data *d, const Workspace *r, long task, long g);
static void run(const Sizes *n, const Data *d, Part *part, int back, long first, long last) {
  #pragma omp parallel for schedule(dynamic,1) num_threads(n->threads)
  for (long i=0; i<(n->B+n->each-1)/n->each*n->N*n->parts; i++) {
    Workspace all = workspace(n, back), *r = &all;
    long p = i%n->parts, h = i/n->parts%n->N, b = i/n->parts/n->N*n->each, end = b+n->each<n->B ? b+n->each : n->B;
    weights_in(n, d, r, h);
    if (back) memset(r->dw, 0, 4*(n->G+1)*r->E*(r->D+1));
    for (; b<end; b++) part(n, d, r, b, h, p);
    for (long g=first; g<last; g++) weights_out(n, d, r, i, g);
  }
}
// endregion

// region: step
static float dot(const float *a, const float *b, long n) {
  vec s = {0};
  long i = 0;
  for (; i+VL<=n; i+=VL) s += V(a+i)*V(b+i);
  float res = sum_v(s);
  for (; i<n; i++) res += a[i]*b[i];
  return res;
}

// Features of one row, without zeros between the halves
static void map_one(const Sizes *n, const Workspace *r, const float *x, const float *w, const float *b, float *phi, float *l) {
  if (!n->form) { memcpy(phi, x, 4*n->D); return; }
  for (long e=0; e<n->E; e++) r->y[e] = dot(w+e*n->D, x, n->D) + (b ? b[e] : 0);
  memset(r->y+n->E, 0, 4*(r->E-n->E));
  features(r->y, 1, n->E, r->E, n->form, phi, l);
  memmove(phi+n->E, phi+r->E, 4*n->E);
}

// S = keep·S0 + w·k vᵀ and z alike; S0 may be null
static void state_step(long f, long W, const float *S0, const float *z0, float keep, const float *k, float w, const float *v, float *S, float *z) {
  for (long i=0; i<f; i++) {
    float x = w*k[i];
    z[i] = (S0 ? keep*z0[i] : 0) + x;
    if (S0) for (long j=0; j<W; j++) S[i*W+j] = keep*S0[i*W+j] + x*v[j]; else for (long j=0; j<W; j++) S[i*W+j] = x*v[j];
  }
}

static void step_head(const Sizes *n, const Data *d, long b, long h) {
  Workspace all = workspace(n, 0), *r = &all;
  long f = width(n), W = n->V, head = b*n->N+h;
  float *S = d->S ? d->S+head*f*W : r->S, *z = d->S ? d->z+head*f : r->z, m0 = d->m0 ? d->m0[head] : no_keys(n), m = m0, l = 0;
  map_one(n, r, AT(k,b,h,0), d->wk+h*n->E*n->D, d->bk ? d->bk+h*n->E : 0, r->k, &l);
  if (d->logk) l = d->logk[head];
  if (d->mask && !((uint8_t*)d->mask)[b]) { memset(r->k, 0, 4*f); l = LOG_ZERO; }
  if (n->logs && l>m) m = l;
  state_step(f, W, d->S0 ? d->S0+head*f*W : 0, d->z0+(d->S0 ? head*f : 0), n->logs ? weight(m0-m) : 1, r->k, n->logs ? weight(l-m) : 1, AT(v,b,h,0), S, z);
  d->m[head] = m;
  for (long g=0; g<n->G; g++) {
    long H = h*n->G+g;
    float *o = AT(o,b,H,0), *acc = r->o;
    map_one(n, r, AT(q,b,H,0), d->wq+H*n->E*n->D, d->bq ? d->bq+H*n->E : 0, r->q, 0);
    float den = dot(r->q, z, f);
    den = 1/(fabsf(den)<=1e-30f ? 1e-30f : den);
    memset(acc, 0, 4*W);
    for (long i=0; i<f; i++) for (long j=0; j<W; j++) acc[j] += r->q[i]*S[i*W+j];
    for (long j=0; j<W; j++) o[j] = acc[j]*den;
  }
}

#define EACH_HEAD for (long i=0; i<n->B*n->N; i++)
void attention_forward(const Sizes *n, const Data *d) {
  if (n->T==1 && n->causal && !n->keep && !n->window) {
    #pragma omp parallel for schedule(dynamic,1) num_threads(n->threads) if(n->B*n->N*n->G>16)
    EACH_HEAD step_head(n, d, i/n->N, i%n->N);
    return;
  }
  if (n->parts>1) {
    run(n, d, sum_part, 0, 0, 0);
    #pragma omp parallel for schedule(dynamic,1) num_threads(n->threads)
    EACH_HEAD scan_splits(n, d, i, d->S0, d->z0, d->m0 ? d->m0[i] : no_keys(n), d->S, d->z, 0);
  }
  run(n, d, forward_part, 0, 0, 0);
}
// endregion

// region: window_max
// The largest score of each query in its window, 0 where it sees no key, and the number of that key, or -1
// sizes: threads B N G T past R window, strides of q and k; tensors: q k mask scale, out (B, H, T), which (B, H, T) as int32
void window_max(const long *s, float **a) {
  Sizes n_ = {.B=s[1], .N=s[2], .G=s[3], .T=s[4], .past=s[5], .R=s[6], .window=s[7], .V=1, .E=1, .D=1, .rqb=s[8], .rqh=s[9], .rqt=s[10], .rkb=s[11],
    .rkh=s[12], .rkt=s[13]}, *n = &n_;
  Data d_ = {.rq=a[0], .rk=a[1], .mask=a[2], .scale=a[3], .v=a[1]}, *d = &d_; // of no values: their stride is 0
  #pragma omp parallel for schedule(dynamic,1) num_threads(s[0])
  for (long i=0; i<n->B*n->N; i++) {
    Workspace all = workspace(n, 0), *r = &all;
    long b = i/n->N, h = i%n->N;
    float near[C];
    for (long j=0; j<C; j++) r->c[j] = LOG_ZERO;
    for (long t=0; t<n->T; t+=C) {
      long m = n->T-t<C ? n->T-t : C;
      near_keys(n, d, r, b, h, t, m, 0);
      for (long g=0; g<n->G; g++) {
        long H = h*n->G+g;
        near_weights(n, d, r, b, H, t, m, near);
        for (long x=0; x<m; x++) {
          long at = (b*n->N*n->G+H)*n->T+t+x, j = 0;
          const float *P = r->P+x*r->band;
          while (j<r->band && P[j]!=1) j++; // the weight of the largest is exp(0)
          a[4][at] = j<r->band ? near[x] : 0;
          ((int32_t*)a[5])[at] = j<r->band ? first_key(n, t)+1+x/16*16+j : -1;
        }
      }
    }
  }
}
// Its gradients dq and dk, which begin as zeros, of g (B, H, T); sizes as before; tensors: q k scale which g dq dk, the last in memory (B, ·, heads, R)
void window_max_back(const long *s, float **a) {
  long B = s[1], N = s[2], G = s[3], T = s[4], K = s[4]+s[5], R = s[6];
  #pragma omp parallel for schedule(dynamic,1) num_threads(s[0])
  for (long i=0; i<B*N; i++) for (long H=i%N*G, b=i/N, t, g=0; g<G; g++, H++) for (t=0; t<T; t++) {
    long at = (b*N*G+H)*T+t, j = ((int32_t*)a[3])[at];
    if (j<0) continue;
    float x = a[4][at]**a[2], *dq = a[5]+((b*T+t)*N*G+H)*R, *dk = a[6]+((b*K+j)*N+i%N)*R;
    const float *q = a[0]+b*s[8]+H*s[9]+t*s[10], *k = a[1]+b*s[11]+i%N*s[12]+j*s[13];
    for (long c=0; c<R; c++) { dq[c] = x*k[c]; dk[c] += x*q[c]; }
  }
}
// endregion

// region: window_step
// One token of the hybrid, a ring of the last `w` keys (B, N, w, ·) before it, and which are real (B, w); phi_k and log_k are of the key that leaves
static void window_step_head(const long *n, float **a, long head, float scale) {
  long N = n[1], G = n[2], R = n[3], W = n[4], F = n[5], w = n[6], b = head/N, h = head%N, real = !a[9] || ((uint8_t*)a[9])[b];
  const float *q = a[0], *k = a[1]+head*R, *v = a[2]+head*W, *fq = a[3], *fk = a[4]+head*F, *logq = a[5], *logk = a[6], *gamma = a[7];
  const float *K = a[10]+head*w*R, *X = a[11]+head*w*W, *there = a[12]+b*w, *S0 = a[13]+head*F*W, *z0 = a[14]+head*F;
  float *o = a[16], *K1 = a[17]+head*w*R, *X1 = a[18]+head*w*W, *there1 = a[19]+b*w, *S = a[20]+head*F*W, *z = a[21]+head*F;
  float *p = floats(w+F+W), *zero = p+w, *acc = zero+F, m0 = a[15][head];
  memset(zero, 0, 4*F);
  int leaves = w ? *there>0 : real; // is the key that leaves the window real?
  float l = leaves ? logk ? logk[head] : 0 : LOG_ZERO, m = l>m0 ? l : m0;
  state_step(F, W, S0, z0, weight(m0-m), leaves ? fk : zero, weight(l-m), w ? X : v, S, z);
  a[22][head] = m;
  if (w) {
    memcpy(K1, K+R, 4*(w-1)*R); memcpy(K1+(w-1)*R, k, 4*R); memcpy(X1, X+W, 4*(w-1)*W); memcpy(X1+(w-1)*W, v, 4*W);
    if (!h) { memcpy(there1, there+1, 4*(w-1)); there1[w-1] = real; } // once for all heads
  }
  for (long g=0; g<G; g++) {
    long H = h*G+g, at = b*N*G+H;
    float far = m + (logq ? logq[at] : 0), top = LOG_ZERO, den = 0;
    for (long j=0; j<w; j++) {
      p[j] = (j<w-1 ? there[j+1]<=0 : !real) ? LOG_ZERO : dot(q+at*R, K1+j*R, R)*scale + (gamma ? gamma[H] : 0);
      if (p[j]>top) top = p[j];
    }
    int sees = top>LOG_ZERO/2;
    if (far>top) top = far;
    float f = weight(far-top);
    memset(acc, 0, 4*W);
    for (long i=0; i<F; i++) { float x = f*fq[at*F+i]; den += x*z[i]; for (long j=0; j<W; j++) acc[j] += x*S[i*W+j]; }
    if (sees) for (long i=0; i<w; i++) {
      float x = p[i]<LOG_ZERO/2 ? 0 : weight(p[i]-top);
      den += x;
      for (long j=0; j<W; j++) acc[j] += x*X1[i*W+j];
    }
    den = 1/(fabsf(den)<=1e-30f ? 1e-30f : den);
    for (long j=0; j<W; j++) o[at*W+j] = acc[j]*den;
  }
}
// sizes: B N G R V F w threads; tensors: q k v phi_q phi_k log_q log_k gamma scale mask, ring k v real, S z m, o, and ring and state after; all contiguous
void window_step(const long *n, float **a) {
  #pragma omp parallel for schedule(dynamic,1) num_threads(n[7]) if(n[0]*n[1]*n[2]>16)
  for (long i=0; i<n[0]*n[1]; i++) window_step_head(n, a, i, *a[8]);
}
// endregion

// region: backward
static void map_back(const Sizes *n, const Workspace *r, const float *a, long la, const float *phi, const float *dphi, long m, const float *w, float *dw,
                     float *to, long ld) {
  if (!n->form) { rows_out(dphi, r->F, m, n->D, to, ld); return; }
  long D = r->D, E = r->E, there = m%MR==0 && n->D==D; // can the gradient go where it belongs at once?
  float *db = dw+E*D;
  features_back(phi, dphi, m, E, n->form, r->y);
  memset(r->y+m*E, 0, 4*E*(tiles(m)-m));
  if (n->D!=D) {
    rows_in(w, n->D, n->E, n->E, n->D, r->W, D); w = r->W;
    rows_in(a, la, m, m, n->D, r->x, D); a = r->x; la = D;
  }
  product(tiles(m), D, n->E, r->y, E, 1, w, D, there ? to : r->dx, there ? ld : D, 0);
  if (!there) rows_out(r->dx, D, m, n->D, to, ld);
  product(E, D, m, r->y, 1, E, a, la, dw, D, 1);
  for (long i=0; i<m; i++) for (long e=0; e<E; e+=VL) V(db+e) += V(r->y+i*E+e);
}

static void gradients_in(const Sizes *n, const Data *d, const Workspace *r, long b, long H, long t, long m) {
  rows_in(AT(g,b,H,t), n->gt, m, round_up16(m), n->V, r->g, r->V);
  memset(r->gd, 0, 4*round_up16(m));
  for (long i=0; i<m; i++) {
    float den = d->den[(b*n->N*n->G+H)*n->T+t+i], by = fabsf(den)<=1e-30f ? 0 : 1/den, *g = r->g+i*r->V;
    r->gd[i] = by==0 ? 0 : -by*dot(g, AT(o,b,H,t+i), n->V);
    if (by==0) memset(g, 0, 4*r->V); else scale_row(g, r->V, by);
  }
}
static void scale_gradients(const Workspace *r, const float *by, long m) { for (long i=0; i<m; i++) { scale_row(r->g+i*r->V, r->V, by[i]); r->gd[i] *= by[i]; } }

// What goes through the window: to its queries, and to keys and values near the chunk. Leaves the gradients of what is older
static void near_back(const Sizes *n, const Data *d, const Workspace *r, long b, long H, long t, long m) {
  long M = round_up16(m), W = r->band, R = r->R, L = r->reach, V_ = r->V;
  float near[C], sum = 0;
  near_weights(n, d, r, b, H, t, m, near);
  for (long i=0; i<M; i+=16) {
    product(16, W, V_, r->g+i*V_, V_, 1, r->vbT+i, L, r->dP+i*W, W, 0);
    product(W, V_, 16, r->P+i*W, 1, W, r->g+i*V_, V_, r->dvb+i*V_, V_, 1);
    for (long x=i; x<i+16; x++) {
      float *p = r->P+x*W, *dp = r->dP+x*W;
      vec s = {0};
      for (long j=0; j<W; j+=VL) { V(dp+j) = V(p+j)*(V(dp+j)+r->gd[x]); s += V(dp+j); }
      sum += sum_v(s);
    }
    product(16, R, W, r->dP+i*W, W, 1, r->rk+i*R, R, r->drq+i*R, R, 0);
    product(W, R, 16, r->dP+i*W, 1, W, r->rq+i*R, R, r->drk+i*R, R, 1);
  }
  rows_out(r->drq, R, m, n->R, QUERY(drq, n->R), n->N*n->G*n->R);
  if (d->dgamma) d->dgamma[b*n->N*n->G+H] += sum;
  for (long i=0; i<m; i++) near[i] = far_weight(n, d, r, b, H, t, i, near[i]);
  scale_gradients(r, near, m);
}

static void queries_back(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long g, long t, long m, int past) {
  long M = round_up16(m), rows = tiles(m), F = r->F, W = r->V, H = h*n->G+g;
  int weighed = n->logs && inside(n);
  map(n, r, AT(q,b,H,t), n->qt, m, M, r->wq+g*r->D*r->E, d->bq ? d->bq+H*n->E : 0, r->q, 0);
  gradients_in(n, d, r, b, H, t, m);
  if (n->window) near_back(n, d, r, b, H, t, m);
  if (inside(n)) {
    for (long i=0; i<m; i+=16) {
      product(least(16, rows-i), round_up16(met(n, i, m)), F, r->q+i*F, F, 1, r->kT, C, r->A+i*C, C, 0);
      product(least(16, rows-i), round_up16(met(n, i, m)), W, r->g+i*W, W, 1, r->vT, C, r->dA+i*C, C, 0);
    }
    for (long i=0; i<m; i++) for (long j=0; j<met(n, i/16*16, m); j+=VL) V(r->dA+i*C+j) += r->gd[i];
    if (weighed) weigh(n, r, r->A, r->dA, m);
    if (n->causal) { triangle(r->A, rows); triangle(r->dA, rows); }
    for (long j=0; j<m; j+=16) {
      long i = n->causal ? j : 0; // the first query that meets these keys
      product(least(16, rows-j), F, m-i, r->dA+i*C+j, 1, C, r->q+i*F, F, r->dk+j*F, F, 1);
      product(least(16, rows-j), W, m-i, r->A+i*C+j, 1, C, r->g+i*W, W, r->dv+j*W, W, 1);
      product(least(16, rows-j), F, met(n, j, m), r->dA+j*C, C, 1, r->k, F, r->dphi+j*F, F, 0);
    }
    if (past && weighed) scale_gradients(r, r->e, m);
  }
  if (past) {
    product(rows, F, n->V, r->g, W, 1, r->ST, F, r->dphi, F, inside(n));
    product(F, W, m, r->q, 1, F, r->g, W, r->dS, W, 1);
    for (long i=0; i<m; i++) for (long f=0; f<F; f+=VL) { V(r->dphi+i*F+f) += V(r->z+f)*r->gd[i]; V(r->dz+f) += V(r->q+i*F+f)*r->gd[i]; }
  }
  if (d->dlogq) for (long i=0; i<m; i++) d->dlogq[(b*n->N*n->G+H)*n->T+t+i] = dot_row(r->q+i*F, r->dphi+i*F, F);
  map_back(n, r, AT(q,b,H,t), n->qt, r->q, r->dphi, m, d->wq+H*n->E*n->D, r->dw+g*r->E*(r->D+1), QUERY(dq, n->D), n->N*n->G*n->D);
}

static void keys_from_state(const Sizes *n, const Workspace *r, long m, float after) {
  transpose(r->dS, r->V, r->F, r->V, r->dST, r->F);
  product(tiles(m), r->F, n->V, r->v, r->V, 1, r->dST, r->F, r->dk, r->F, 0);
  for (long i=0; i<m; i++) for (long f=0; f<r->F; f+=VL) V(r->dk+i*r->F+f) += V(r->dz+f);
  product(tiles(m), r->V, r->F, r->k, r->F, 1, r->dS, r->V, r->dv, r->V, 0);
  if (n->logs) for (long i=0; i<m; i++) { float w = weight(r->l[i]-after); scale_row(r->dk+i*r->F, r->F, w); scale_row(r->dv+i*r->V, r->V, w); }
}

static void keys_back(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long t, long m) {
  long none = missing(n, t, m), s = first_key(n, t)+none, F = r->F, W = r->V;
  if (none==m) return;
  if (d->mask) for (long i=none; i<m; i++) if (!((uint8_t*)d->mask)[b*KEYS+s+i-none]) memset(r->dk+i*F, 0, 4*F);
  if (d->dlogk) for (long i=none; i<m; i++) d->dlogk[(b*n->N+h)*KEYS+s+i-none] = dot_row(r->k+i*F, r->dk+i*F, F);
  map_back(n, r, AT(k,b,h,s), n->kt, r->k+none*F, r->dk+none*F, m-none, d->wk+h*n->E*n->D, r->dw+n->G*r->E*(r->D+1), KEY(dk, s, n->D), n->N*n->D);
  if (n->window) rows_add(r->dv+none*W, W, m-none, n->V, KEY(dv, s, n->V), n->N*n->V);
  else rows_out(r->dv, W, m, n->V, KEY(dv, s, n->V), n->N*n->V);
}

static void near_keys_back(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long t, long m) { // other chunks add to these keys too
  long s = first_key(n, t)+1;
  for (long i=0; i<m+n->window-1; i++) if (s+i>=0 && r->hide[i]==0) {
    float *k = KEY(drk, s+i, n->R), *v = KEY(dv, s+i, n->V);
    for (long j=0; j<n->R; j++) k[j] += r->drk[i*r->R+j]**d->scale;
    for (long j=0; j<n->V; j++) v[j] += r->dvb[i*r->V+j];
  }
}

static void weights_out(const Sizes *n, const Data *d, const Workspace *r, long task, long g) { // of query head g, or of the keys if g is G
  if (!n->form) return;
  long which = task/n->parts/n->N*n->parts+task%n->parts, h = task/n->parts%n->N, head = g<n->G ? (which*n->N+h)*n->G+g : which*n->N+h;
  const float *from = r->dw+g*r->E*(r->D+1);
  rows_out(from, r->D, n->E, n->D, (g<n->G ? d->dwq : d->dwk)+head*n->E*n->D, n->D);
  memcpy((g<n->G ? d->dbq : d->dbk)+head*n->E, from+r->E*r->D, 4*n->E);
}

// The largest log weights of a chunk as the forward pass found them, and those of the state before it, of which it returns m
static float before_chunk(const Sizes *n, const Data *d, const Workspace *r, long head, long t, long m) {
  float before = n->state || t ? saved(n, d, r, head, t)[SAVED-16] : no_keys(n);
  if (n->logs && !n->causal) largest(n, r, before, m);
  else if (n->logs) { memcpy(r->c, d->top+head*n->T+t, 4*m); for (long i=0; i<m; i++) r->e[i] = weight(before-r->c[i]); }
  return before;
}

// What a part adds to dS and dz; without causality all of its queries' gradients. Returns the m that it is relative to
static float add_queries(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p) {
  long head = b*n->N+h;
  float m_part = n->causal ? 0 : d->m[head];
  if (!n->causal) {
    state_in(n, r, d->S, d->z, head, r->S, r->z);
    transpose(r->S, r->V, r->F, r->V, r->ST, r->F);
  }
  for (long t=split_start(n,p), end=split_start(n,p+1); t<end; t+=C) {
    long m = end-t<C ? end-t : C;
    if (n->causal) {
      float before = before_chunk(n, d, r, head, t, m);
      if (t==split_start(n,p)) m_part = before;
      if (n->logs) for (long i=0; i<m; i++) r->e[i] = weight(m_part-r->c[i]);
    }
    for (long g=0; g<n->G; g++) {
      long H = h*n->G+g;
      if (!n->causal) { queries_back(n, d, r, b, h, g, t, m, 1); continue; }
      map(n, r, AT(q,b,H,t), n->qt, m, round_up16(m), r->wq+g*r->D*r->E, d->bq ? d->bq+H*n->E : 0, r->q, 0);
      gradients_in(n, d, r, b, H, t, m);
      if (n->logs) scale_gradients(r, r->e, m);
      product(r->F, r->V, round_up16(m), r->q, 1, r->F, r->g, r->V, r->dS, r->V, 1);
      for (long i=0; i<m; i++) for (long f=0; f<r->F; f+=VL) V(r->dz+f) += V(r->q+i*r->F+f)*r->gd[i];
    }
  }
  return m_part;
}
static void queries_part(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p) {
  memset(r->dS, 0, 4*r->F*r->V); memset(r->dz, 0, 4*r->F);
  float m = add_queries(n, d, r, b, h, p);
  save(r, r->dS, r->dz, m, sums_at(n, d, r, b*n->N+h, p));
}

static void backward_part(const Sizes *n, const Data *d, const Workspace *r, long b, long h, long p) {
  long head = b*n->N+h, F = r->F, W = r->V, begins = split_start(n,p), ends = split_start(n,p+1);
  if (n->parts>1) load(r, sums_at(n, d, r, head, p), r->dS, r->dz);
  else if (!n->direct) state_in(n, r, d->dS, d->dz, head, r->dS, r->dz);
  if (n->parts==1 && !inside(n)) add_queries(n, d, r, b, h, p);
  for (long t=begins+(ends-begins-1)/C*C; t>=begins; t-=C) {
    long m = ends-t<C ? ends-t : C, past = n->state || t;
    keys(n, d, r, b, h, t, m);
    if (inside(n)) {
      float before = before_chunk(n, d, r, head, t, m), after = n->logs ? r->c[m-1] : 0;
      if (d->dS || t+C<n->T) keys_from_state(n, r, m, after);
      else { memset(r->dk, 0, 4*round_up16(m)*F); memset(r->dv, 0, 4*round_up16(m)*W); }
      if (past) {
        const float *state = saved(n, d, r, head, t);
        if (n->logs) scale_state(r, r->dS, r->dz, weight(before-after));
        memcpy(r->z, state+F*W, 4*F);
        transpose(state, W, F, W, r->ST, F);
      }
      transpose(r->v, W, round_up16(m), W, r->vT, C);
      if (n->window) { near_keys(n, d, r, b, h, t, m, 1); memset(r->drk, 0, 4*r->reach*r->R); memset(r->dvb, 0, 4*r->reach*W); }
      for (long g=0; g<n->G; g++) queries_back(n, d, r, b, h, g, t, m, past);
      if (n->window) near_keys_back(n, d, r, b, h, t, m);
    } else keys_from_state(n, r, m, d->m[head]);
    keys_back(n, d, r, b, h, t, m);
  }
  if (n->parts>1 || !d->dS0) return;
  if (!n->causal && n->logs) scale_state(r, r->dS, r->dz, weight(d->m0[head]-d->m[head])); // what was before is part of a state of this m
  state_out(n, r, r->dS, r->dz, d->dS0, d->dz0, head);
}

void attention_backward(const Sizes *n, const Data *d) {
  if (n->parts>1) {
    run(n, d, queries_part, 1, 0, n->causal ? 0 : n->G);
    #pragma omp parallel for schedule(dynamic,1) num_threads(n->threads)
    EACH_HEAD scan_splits(n, d, i, d->dS, d->dz, d->m[i], d->dS0, d->dz0, 1);
  }
  run(n, d, backward_part, 1, n->causal || n->parts==1 ? 0 : n->G, n->G+1);
}
// endregion

// region: map
static Sizes map_sizes(const long *n) { return (Sizes){.B=n[1], .N=n[2], .T=n[3], .D=n[4], .E=n[5], .form=n[6], .G=1, .V=1}; }
// phi (B, H, T, 2E) and log weights (B, H, T) of x; sizes: threads B H T D E form, strides of x; tensors: x w b phi l
void map_forward(const long *s, float **a) {
  Sizes n_ = map_sizes(s), *n = &n_;
  long chunks = (n->T+C-1)/C, e = n->E;
  #pragma omp parallel for schedule(static) num_threads(s[0]) if(n->B*n->N*n->T>16)
  for (long i=0; i<n->B*n->N; i++) {
    Workspace all = workspace(n, 0), *r = &all;
    Data d = {.wq=a[1]+i%n->N*e*n->D, .wk=a[1]+i%n->N*e*n->D};
    weights_in(n, &d, r, 0);
    for (long c=0; c<chunks; c++) {
      long t = c*C, m = n->T-t<C ? n->T-t : C;
      float *to = a[3]+(i*n->T+t)*2*e;
      map(n, r, a[0]+i/n->N*s[7]+i%n->N*s[8]+t*s[9], s[9], m, round_up16(m), r->wk, a[2] ? a[2]+i%n->N*e : 0, e==r->E && m%16==0 ? to : r->q, a[4] ? a[4]+i*n->T+t : 0);
      if (e!=r->E || m%16) { rows_out(r->q, r->F, m, e, to, 2*e); rows_out(r->q+r->E, r->F, m, e, to+e, 2*e); }
    }
  }
}
// dx (B, H, T, D) or null, dw (B, H, E, D), db (B, H, E); tensors: x w phi dphi dx dw db dl
void map_backward(const long *s, float **a) {
  Sizes n_ = map_sizes(s), *n = &n_;
  long chunks = (n->T+C-1)/C, e = n->E, c = n->D;
  #pragma omp parallel for schedule(static) num_threads(s[0])
  for (long i=0; i<n->B*n->N; i++) {
    Workspace all = workspace(n, 1), *r = &all;
    long D = r->D, E = r->E;
    float *db = r->dw+E*D;
    memset(r->dw, 0, 4*E*(D+1));
    rows_in(a[1]+i%n->N*e*c, c, e, E, c, r->W, D);
    for (long k=0; k<chunks; k++) {
      long t = k*C, m = n->T-t<C ? n->T-t : C, M = round_up16(m);
      const float *phi = a[2]+(i*n->T+t)*2*e, *g = a[3]+(i*n->T+t)*2*e;
      if (e!=E) { // zeros between the halves
        for (long h=0; h<2; h++) for (long j=0; j<m; j++) {
          memcpy(r->q+j*r->F+h*E, phi+j*2*e+h*e, 4*e); memset(r->q+j*r->F+h*E+e, 0, 4*(E-e));
          memcpy(r->dphi+j*r->F+h*E, g+j*2*e+h*e, 4*e); memset(r->dphi+j*r->F+h*E+e, 0, 4*(E-e));
        }
        phi = r->q; g = r->dphi;
      }
      features_back(phi, g, m, E, n->form, r->y);
      if (n->form==EXP) for (long j=0; j<m; j++) { // the log weight is the largest |y|, whose feature is 1
        const float *f = phi+j*2*E, *y = g+j*2*E;
        float dl = a[7][i*n->T+t+j], many = 0;
        for (long x=0; x<2*E; x++) { dl -= f[x]*y[x]; many += f[x]==1; }
        for (long x=0; x<E; x++) r->y[j*E+x] += dl/many*((f[x]==1)-(f[E+x]==1));
      }
      memset(r->y+m*E, 0, 4*E*(M-m));
      if (a[4]) { product(M, D, e, r->y, E, 1, r->W, D, r->dx, D, 0); rows_out(r->dx, D, m, c, a[4]+(i*n->T+t)*c, c); }
      rows_in(a[0]+i/n->N*s[7]+i%n->N*s[8]+t*s[9], s[9], m, M, c, r->x, D);
      product(E, D, M, r->y, 1, E, r->x, D, r->dw, D, 1);
      for (long j=0; j<m; j++) for (long x=0; x<E; x+=VL) V(db+x) += V(r->y+j*E+x);
    }
    rows_out(r->dw, D, e, c, a[5]+i*e*c, c); memcpy(a[6]+i*e, db, 4*e);
  }
}
// endregion

// region: loss
#define HIDDEN -3e38f
// Scores and similarities of n keys, LOG_ZERO and HIDDEN where one is not seen, and log weights x of the similarities, or null:
// the loss of a row. u becomes the gradient of the similarities, x that of the log weights.
static float loss_row(float *s, float *u, float *x, long n) {
  const vec least = (vec){0}+1e-30f;
  vec top = V(s), Z = {0}, A = {0}, loss = {0};
  for (long j=VL; j<n; j+=VL) top = pick(V(s+j)>top, V(s+j), top);
  vec most = (vec){0}+max_v(top);
  if (x) {
    vec t = V(x);
    for (long j=VL; j<n; j+=VL) t = pick(V(x+j)>t, V(x+j), t);
    t = (vec){0}+max_v(t);
    for (long j=0; j<n; j+=VL) V(x+j) = weight_v(V(x+j)-t);
  }
  for (long j=0; j<n; j+=VL) {
    V(s+j) = exp_v(V(s+j)-most); Z += V(s+j);
    ivec gone = V(u+j)<=(vec){0}+HIDDEN;
    vec y = pick(V(u+j)<least, least, V(u+j));
    if (x) { y *= V(x+j); y = pick(y<least, least, y); }
    A += pick(gone, (vec){0}, y);
    V(u+j) = pick(gone, least, y);
  }
  vec z = (vec){0}+1/sum_v(Z), a = (vec){0}+1/sum_v(A);
  for (long j=0; j<n; j+=VL) {
    vec p = V(s+j)*z, y = V(u+j), r = p/y, g = pick(y>least, a-r, (vec){0});
    loss += p*log_v(pick(r<least, least, r));
    if (x) { V(u+j) = g*V(x+j); V(x+j) = g*y; } else V(u+j) = g;
  }
  return sum_v(loss) - logf(a[0]);
}

typedef struct { int64_t threads, B, H, N, T, D, F, causal, window; } LossSizes;
typedef struct { float *q, *k, *fq, *fk, *logq, *logk, *real, *loss, *dq, *dk, *dlogq, *dlogk; } LossData;

// One head b*H+i: the gradient of its keys (T, F) and their log weights are its own, and summed over query heads afterwards
static void loss_head(const LossSizes *n, const LossData *d, long head) {
  long T = n->T, D = n->D, F = n->F, t = round_up16(T), dd = round_up16(D), f = round_up16(F), wide = dd>f ? dd : f, total = 0;
  long kv = head/n->H*n->N + head%n->H/(n->H/n->N);
  int logs = d->logk || d->logq || n->window;
  const uint8_t *real = d->real ? (uint8_t*)d->real+head/n->H*T : 0;
  const float *q = d->q+head*T*D, *fq = d->fq+head*T*F, *logq = d->logq ? d->logq+head*T : 0, *logk = d->logk ? d->logk+kv*T : 0;
  float *kT, *fkT, *keys, *dkeys, *s, *u, *x, *rows, *frows, *df, *dl;
#define LOSS_BUFFERS(X) X(kT, dd*t) X(fkT, f*t) X(keys, t*wide) X(dkeys, t*f) X(s, C*t) X(u, C*t) X(x, t) X(rows, C*dd) X(frows, C*f) X(df, C*f) X(dl, t)
#define LOSS_PLACE(name, size) name = p; p += round_up16(size);
  LOSS_BUFFERS(COUNT)
  float *p = floats(total);
  LOSS_BUFFERS(LOSS_PLACE)
  rows_in(d->k+kv*T*D, D, T, t, D, keys, dd); transpose(keys, dd, t, dd, kT, t);
  rows_in(d->fk+kv*T*F, F, T, t, F, keys, f); transpose(keys, f, t, f, fkT, t);
  memset(dkeys, 0, 4*t*f); memset(dl, 0, 4*t);
  double sum = 0;
  for (long i=0; i<T; i+=C) {
    long m = T-i<C ? T-i : C, e = n->causal ? round_up16(i+m) : t;
    rows_in(q+i*D, D, m, round_up16(m), D, rows, dd); rows_in(fq+i*F, F, m, round_up16(m), F, frows, f);
    product(round_up16(m), e, D, rows, dd, 1, kT, t, s, t, 0);
    product(round_up16(m), e, F, frows, f, 1, fkT, t, u, t, 0);
    for (long r=0; r<round_up16(m); r++) {
      float *sr = s+r*t, *ur = u+r*t, lq = logq && r<m ? logq[i+r] : 0;
      long near = n->window && i+r+1>n->window ? i+r+1-n->window : 0; // the window's first key
      if (r<m && d->dlogq) d->dlogq[head*T+i+r] = 0;
      if (r>=m || (real && !real[i+r])) { memset(ur, 0, 4*e); continue; }
      if (logs) {
        for (long j=0; j<e; j+=VL) V(x+j) = (vec){0}+lq;
        if (logk) for (long j=0; j<e && j<T; j++) x[j] += logk[j];
        if (n->window) for (long j=near; j<=i+r; j++) { x[j] = sr[j]; ur[j] = 1; }
      }
      for (long j=n->causal ? i+r+1 : T; j<e; j++) { sr[j] = LOG_ZERO; ur[j] = HIDDEN; if (logs) x[j] = LOG_ZERO; }
      if (real) for (long j=0; j<e && j<T; j++) if (!real[j]) { sr[j] = LOG_ZERO; ur[j] = HIDDEN; if (logs) x[j] = LOG_ZERO; }
      sum += loss_row(sr, ur, logs ? x : 0, e);
      if (!logs) continue;
      if (n->window) for (long j=near; j<=i+r; j++) ur[j] = x[j] = 0; // softmax's own weights, which teach the map nothing
      vec g = {0};
      for (long j=0; j<e; j+=VL) { g += V(x+j); V(dl+j) += V(x+j); }
      if (d->dlogq) d->dlogq[head*T+i+r] = sum_v(g);
    }
    product(round_up16(m), f, e, u, t, 1, keys, f, df, f, 0);
    rows_out(df, f, m, F, d->dq+(head*T+i)*F, F);
    product(e, f, round_up16(m), u, 1, t, frows, f, dkeys, f, 1);
  }
  rows_out(dkeys, f, T, F, d->dk+head*T*F, F);
  if (d->dlogk) memcpy(d->dlogk+head*T, dl, 4*T);
  d->loss[head] = sum;
  if (have>1<<22) { free(space); space = 0; have = 0; } // what grows with T is not kept
}

void loss_all(const LossSizes *n, const LossData *d) {
  #pragma omp parallel for schedule(dynamic,1) num_threads(n->threads)
  for (long i=0; i<n->B*n->H; i++) loss_head(n, d, i);
}
// endregion

#ifdef _OPENMP
const int has_threads = 1;
#else
const int has_threads = 0;
#endif
