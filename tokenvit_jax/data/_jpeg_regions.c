/* Decodes, crops, resizes and mirrors a JPEG in one pass; jpeg_regions.py is the only caller.

The decoder is the libjpeg-turbo that Pillow itself has loaded, looked up at run time: the pixels
are the same, no header and no library is needed to compile this file, and nothing is linked. The
arithmetic of the resize is Pillow's (Resample.c): coefficients with 22 fractional bits, and a
rounding to 8 bits between the two passes. Whatever is not a clean JPEG of three components or one
gives None, and Pillow decodes the file. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------------------------------
   libjpeg's binary interface, version 62. jpeg_CreateDecompress compares the version and the size
   of the structure with its own and reports an error if they differ. */

enum { VERSION = 62, GREY = 1, RGB = 2, YCBCR = 3 };

typedef struct Jpeg Jpeg;

typedef struct {
    void (*error_exit)(Jpeg *);
    void (*emit_message)(Jpeg *, int level);
    void (*output_message)(Jpeg *);
    void (*format_message)(Jpeg *, char *);
    void (*reset)(Jpeg *);
    int code;
    union { int numbers[8]; char text[80]; } parameters;
    int trace_level;
    long warnings;
    const char *const *messages;
    int last_message;
    const char *const *more_messages;
    int first_more, last_more;
} Errors;

struct Jpeg {
    Errors *errors;
    void *memory, *progress, *client;
    int is_decompressor, state;
    void *source;
    unsigned width, height;
    int components, color_space, out_color_space;
    unsigned scale_num, scale_denom;
    double gamma;
    int buffered, raw, dct_method, fancy_upsampling, block_smoothing, quantize, dither, two_pass;
    int colors, quantizers[3];
    unsigned out_width, out_height;
    int out_color_components, out_components, rows_at_once, actual_colors;
    void *colormap;
    unsigned row;
    int input_scan;
    unsigned input_row;
    int output_scan;
    unsigned output_row;
    void *progression, *quant_tables[4], *huffman_tables[8];
    int precision;
    void *component_info;
    int progressive, arithmetic;
    uint8_t conditioning[48];
    unsigned restart_interval;
    int saw_jfif;
    uint8_t jfif[3];
    uint16_t density[2];
    int saw_adobe;
    uint8_t adobe_transform;
    int ccir601;
    void *markers;
    int max_h, max_v, min_dct;
    unsigned mcu_rows_total;
    void *range_limit;
    int scan_components;
    void *scan_component_info[4];
    unsigned mcus_per_row, mcu_rows;
    int blocks, membership[10], spectral[4], unread_marker;
    void *modules[11];
};

static struct {
    Errors *(*std_error)(Errors *);
    void (*create)(Jpeg *, int version, size_t size);
    void (*mem_src)(Jpeg *, const unsigned char *, unsigned long);
    int (*read_header)(Jpeg *, int require_image);
    int (*start)(Jpeg *);
    void (*crop)(Jpeg *, unsigned *left, unsigned *width);
    unsigned (*skip)(Jpeg *, unsigned rows);
    unsigned (*read)(Jpeg *, uint8_t **rows, unsigned count);
    void (*destroy)(Jpeg *);
} lib;

typedef struct {
    Jpeg jpeg;
    Errors errors;
    jmp_buf failed;
} Decoder;

static void fail(Jpeg *jpeg) { longjmp(((Decoder *)jpeg)->failed, 1); }

/* A warning (level -1) tells of damage: Pillow decides what becomes of the file. */
static void warn(Jpeg *jpeg, int level) {
    if (level < 0) fail(jpeg);
}

/* Reads the header. The caller has set `failed` and destroys the decoder. */
static int open_jpeg(Decoder *decoder, const uint8_t *content, size_t size) {
    Jpeg *jpeg = &decoder->jpeg;
    lib.create(jpeg, VERSION, sizeof(Jpeg));
    lib.mem_src(jpeg, content, size);
    lib.read_header(jpeg, 1);
    return jpeg->precision == 8 && (jpeg->components == 1 || jpeg->components == 3);
}

static void prepare(Decoder *decoder) {
    memset(decoder, 0, sizeof *decoder);
    decoder->jpeg.errors = lib.std_error(&decoder->errors);
    decoder->errors.error_exit = fail;
    decoder->errors.emit_message = warn;
}

/* ---------------------------------------------------------------------------------------------
   Resize */

enum {
    BITS = 22,    /* fraction of a weight */
    LOW_BITS = 11, /* bits of a weight's lower half: both halves fit 16-bit products */
    ROWS = 4,     /* rows that are resized at once */
    SLACK = 32    /* bytes that vectors read and write beyond the end of a row */
};

/* Two weights each, as the 16-bit halves of 32 bits. */
typedef struct { uint32_t high, low; } Pair;

/* Output i is the sum of weights[i * most + j] * input value (first[i] + j), j < count[i].
   `pairs` are the same weights for vectors: most / 2 per output, zeros after the last weight. */
typedef struct {
    int *first, *count;
    int32_t *weights;
    Pair *pairs;
    int most, low, high; /* most: a multiple of 4; all inputs lie in [low, high) */
} Taps;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
    x = fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

static uint32_t halves(int32_t even, int32_t odd) { return (even & 0xffff) | (uint32_t)odd << 16; }

static int allocate_taps(Taps *taps, int size, int most) {
    size_t total = (size_t)size * most;
    taps->most = most;
    taps->first = malloc(size * sizeof(int)), taps->count = malloc(size * sizeof(int));
    taps->weights = calloc(total, sizeof(int32_t)), taps->pairs = malloc(total / 2 * sizeof(Pair));
    return taps->first && taps->count && taps->weights && taps->pairs;
}

static void free_taps(Taps *taps) {
    free(taps->first), free(taps->count), free(taps->weights), free(taps->pairs);
}

/* Writes the weights of one output, whose inputs are [first, first + count). */
static void make_weights(int32_t *weights, Pair *pairs, int most, double *exact, int first,
                         int count, double center, double inverse, int cubic) {
    double sum = 0.0;
    for (int j = 0; j < count; j++) {
        double x = (j + first - center + 0.5) * inverse;
        sum += exact[j] = cubic ? bicubic(x) : bilinear(x);
    }
    for (int j = 0; j < count; j++) {
        double weight = (sum != 0.0 ? exact[j] / sum : exact[j]) * (1 << BITS);
        weights[j] = (int)(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    for (int j = 0; j < most; j += 2) {
        int mask = (1 << LOW_BITS) - 1;
        pairs[j / 2].high = halves(weights[j] >> LOW_BITS, weights[j + 1] >> LOW_BITS);
        pairs[j / 2].low = halves(weights[j] & mask, weights[j + 1] & mask);
    }
}

/* Computes the taps of outputs [start, stop) of a resize of [from, to) of `in` values to `out`. */
static int make_taps(Taps *taps, int in, float from, float to, int out, int start, int stop,
                     int cubic, int mirror) {
    double scale = (double)(to - from) / out, stretch = scale < 1.0 ? 1.0 : scale;
    double support = (cubic ? 2.0 : 1.0) * stretch;
    int most = ((int)ceil(support) * 2 + 1 + 3) / 4 * 4;
    double *exact = malloc(most * sizeof *exact);
    if (!allocate_taps(taps, stop - start, most) || !exact) {
        free(exact);
        return 0;
    }
    taps->low = in, taps->high = 0;
    for (int i = start; i < stop; i++) {
        size_t place = mirror ? stop - 1 - i : i - start;
        double center = from + (i + 0.5) * scale;
        int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        if (first < 0) first = 0;
        if (end > in) end = in;
        make_weights(taps->weights + place * most, taps->pairs + place * most / 2, most, exact,
                     first, end - first, center, 1.0 / stretch, cubic);
        taps->first[place] = first, taps->count[place] = end - first;
        if (first < taps->low) taps->low = first;
        if (end > taps->high) taps->high = end;
    }
    free(exact);
    return 1;
}

/* The two passes.

   resize_rows: ROWS rows of RGB at once, which share the weights; `low` is the column of in[][0].
   sum_rows: a weighted sum of taps->count[i] rows of `size` bytes that lie `stride` bytes apart. */

static uint8_t clip(int32_t sum) {
    sum >>= BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

static void resize_row(const uint8_t *in, uint8_t *out, const Taps *taps, int width) {
    for (int x = 0; x < width; x++, out += 3) {
        const uint8_t *pixel = in + 3 * (taps->first[x] - taps->low);
        const int32_t *weights = taps->weights + (size_t)x * taps->most;
        int32_t r = 1 << (BITS - 1), g = r, b = r;
        for (int j = 0; j < taps->count[x]; j++, pixel += 3) {
            r += pixel[0] * weights[j];
            g += pixel[1] * weights[j];
            b += pixel[2] * weights[j];
        }
        out[0] = clip(r), out[1] = clip(g), out[2] = clip(b);
    }
}

static void resize_rows_plain(uint8_t *const *in, uint8_t *const *out, const Taps *taps,
                              int width) {
    for (int row = 0; row < ROWS; row++)
        if (!row || out[row] != out[row - 1]) resize_row(in[row], out[row], taps, width);
}

static void sum_rows_plain(const uint8_t *in, size_t stride, uint8_t *out, const Taps *taps, int i,
                           int size) {
    const int32_t *weights = taps->weights + (size_t)i * taps->most;
    for (int x = 0; x < size; x++) {
        int32_t sum = 1 << (BITS - 1);
        for (int j = 0; j < taps->count[i]; j++) sum += in[j * stride + x] * weights[j];
        out[x] = clip(sum);
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

/* The halves of the sums, joined; rounded to integers. */
AVX2 static inline __m256i join(__m256i high, __m256i low) {
    __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low);
    return _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(1 << (BITS - 1))), BITS);
}

/* One pixel of ROWS rows: (0, 2, -, - | 1, 3, -, -) with four bytes per row, the last undefined. */
AVX2 static inline __m256i resize_pixel(const uint8_t *const *in, size_t offset, const Pair *pair,
                                        int count) {
    /* Four pixels, two in each half: r0 r1 g0 g1 b0 b1 with 16 bits each. */
    const __m256i spread = _mm256_setr_epi8(
        0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
        6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i highs = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
    const __m256i lows = _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3);
    const __m256i half = _mm256_set1_epi32(1 << (BITS - 1));
    __m256i high[ROWS], low[ROWS];
    for (int row = 0; row < ROWS; row++) high[row] = low[row] = _mm256_setzero_si256();
    for (int j = 0; j < count; j += 4, offset += 12, pair += 2) {
        __m256i weights = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)pair));
        __m256i upper = _mm256_permutevar8x32_epi32(weights, highs);
        __m256i lower = _mm256_permutevar8x32_epi32(weights, lows);
        for (int row = 0; row < ROWS; row++) {
            __m128i bytes = _mm_loadu_si128((const void *)(in[row] + offset));
            __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), spread);
            high[row] = _mm256_add_epi32(high[row], _mm256_madd_epi16(pixels, upper));
            low[row] = _mm256_add_epi32(low[row], _mm256_madd_epi16(pixels, lower));
        }
    }
    for (int row = 0; row < ROWS; row++)
        low[row] = _mm256_add_epi32(_mm256_slli_epi32(high[row], LOW_BITS), low[row]);
    for (int row = 0; row < ROWS; row += 2) { /* the halves of two rows, added */
        __m256i left = _mm256_permute2x128_si256(low[row], low[row + 1], 0x20);
        __m256i right = _mm256_permute2x128_si256(low[row], low[row + 1], 0x31);
        __m256i sum = _mm256_add_epi32(_mm256_add_epi32(left, right), half);
        high[row / 2] = _mm256_srai_epi32(sum, BITS);
    }
    __m256i words = _mm256_packs_epi32(high[0], high[1]);
    return _mm256_packus_epi16(words, words);
}

/* Stores four bytes of a pixel, of which the next pixel overwrites one, or three. */
AVX2 static inline void store_pixel(uint8_t *const *out, size_t offset, __m256i pixels, int bytes) {
    __m128i even = _mm256_castsi256_si128(pixels), odd = _mm256_extracti128_si256(pixels, 1);
    int32_t rows[ROWS] = {_mm_cvtsi128_si32(even), _mm_cvtsi128_si32(odd),
                          _mm_extract_epi32(even, 1), _mm_extract_epi32(odd, 1)};
    for (int row = 0; row < ROWS; row++) memcpy(out[row] + offset, &rows[row], bytes);
}

AVX2 static void resize_rows_avx2(uint8_t *const *in, uint8_t *const *out, const Taps *taps,
                                  int width) {
    const uint8_t *from[ROWS] = {in[0], in[1], in[2], in[3]};
    uint8_t *to[ROWS] = {out[0], out[1], out[2], out[3]};
    for (int x = 0; x < width; x++) {
        size_t offset = 3 * (size_t)(taps->first[x] - taps->low);
        const Pair *pair = taps->pairs + (size_t)x * taps->most / 2;
        __m256i pixels = resize_pixel(from, offset, pair, taps->count[x]);
        if (x + 1 < width)
            store_pixel(to, 3 * (size_t)x, pixels, 4);
        else
            store_pixel(to, 3 * (size_t)x, pixels, 3);
    }
}

AVX2 static void sum_rows_avx2(const uint8_t *in, size_t stride, uint8_t *out, const Taps *taps,
                               int i, int size) {
    const Pair *pairs = taps->pairs + (size_t)i * taps->most / 2;
    int count = taps->count[i];
    for (int x = 0; x < size; x += 16) {
        __m256i high0 = _mm256_setzero_si256(), high1 = high0, low0 = high0, low1 = high0;
        for (int j = 0; j < count; j += 2) {
            const uint8_t *row = in + j * stride + x;
            __m128i even = _mm_loadu_si128((const void *)row);
            __m128i odd = j + 1 < count ? _mm_loadu_si128((const void *)(row + stride)) : even;
            __m256i left = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
            __m256i right = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd));
            __m256i high = _mm256_set1_epi32((int)pairs[j / 2].high);
            __m256i low = _mm256_set1_epi32((int)pairs[j / 2].low);
            high0 = _mm256_add_epi32(high0, _mm256_madd_epi16(left, high));
            high1 = _mm256_add_epi32(high1, _mm256_madd_epi16(right, high));
            low0 = _mm256_add_epi32(low0, _mm256_madd_epi16(left, low));
            low1 = _mm256_add_epi32(low1, _mm256_madd_epi16(right, low));
        }
        __m256i sums = _mm256_packs_epi32(join(high0, low0), join(high1, low1));
        sums = _mm256_permute4x64_epi64(sums, 0xd8); /* the packing interleaves the halves */
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(sums),
                                         _mm256_extracti128_si256(sums, 1));
        _mm_storeu_si128((void *)(out + x), bytes);
    }
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
#define resize_rows_avx2 resize_rows_plain
#define sum_rows_avx2 sum_rows_plain
static int has_avx2(void) { return 0; }
#endif

static int vectors; /* whether this processor's vectors are used */

/* Resizes `count` rows that lie `in_stride` bytes apart, at most ROWS. */
static void resize_rows(uint8_t *in, size_t in_stride, uint8_t *out, size_t out_stride, int count,
                        const Taps *taps, int width) {
    uint8_t *from[ROWS], *to[ROWS];
    for (int row = 0; row < ROWS; row++) { /* the last row stands for those that are missing */
        size_t place = row < count ? row : count - 1;
        from[row] = in + in_stride * place, to[row] = out + out_stride * place;
    }
    (vectors ? resize_rows_avx2 : resize_rows_plain)(from, to, taps, width);
}

static void sum_rows(const uint8_t *in, size_t stride, uint8_t *out, const Taps *taps, int i,
                     int size) {
    (vectors ? sum_rows_avx2 : sum_rows_plain)(in, stride, out, taps, i, size);
}

/* ---------------------------------------------------------------------------------------------
   Decoding */

typedef struct {
    int left, top, width, height; /* crop of the image [pixels] */
    Taps across, down;
    int out_width, out_height, vertical_first;
    uint8_t *out;
    uint8_t *lines, *rows; /* ROWS decoded rows; all rows that the vertical pass needs */
} Job;

/* Reads `count` rows, at most ROWS. */
static void read_rows(Jpeg *jpeg, uint8_t *lines, size_t stride, int count) {
    for (int done = 0; done < count;) {
        uint8_t *rows[ROWS];
        for (int row = done; row < count; row++) rows[row - done] = lines + stride * row;
        unsigned read = lib.read(jpeg, rows, count - done);
        if (!read) fail(jpeg);
        done += read;
    }
}

static int fewer(int count) { return count < ROWS ? count : ROWS; }

/* Decodes the region that the taps need and resizes it. The caller has set `failed`. */
static void decode(Decoder *decoder, Job *job) {
    Jpeg *jpeg = &decoder->jpeg;
    const Taps *across = &job->across, *down = &job->down;
    int top = job->top + down->low, height = down->high - down->low;
    int left = job->left + across->low, right = job->left + across->high;
    size_t needed = 3 * (size_t)(right - left), resized = 3 * (size_t)job->out_width;
    size_t stride = job->vertical_first ? needed : resized;
    jpeg->out_color_space = RGB;
    lib.start(jpeg);
    /* Columns at the edge of a cropped decode lack their neighbours' chroma. */
    unsigned start = left > 8 ? left - 8 : 0, stop = right + 8;
    unsigned width = (stop < jpeg->width ? stop : jpeg->width) - start;
    lib.crop(jpeg, &start, &width);
    size_t line = 3 * (size_t)jpeg->width + SLACK;
    job->lines = malloc(ROWS * line);
    job->rows = malloc(stride * height + SLACK);
    if (!job->lines || !job->rows) fail(jpeg);
    uint8_t *pixels = job->lines + 3 * (left - (int)start);
    if (top) lib.skip(jpeg, top);
    for (int y = 0; y < height; y += ROWS) {
        int count = fewer(height - y);
        uint8_t *rows = job->rows + stride * y;
        read_rows(jpeg, job->lines, line, count);
        if (job->vertical_first)
            for (int row = 0; row < count; row++)
                memcpy(rows + stride * row, pixels + line * row, needed);
        else
            resize_rows(pixels, line, rows, stride, count, across, job->out_width);
    }
    for (int y = 0; y < job->out_height; y += ROWS) {
        int count = fewer(job->out_height - y);
        uint8_t *out = job->out + resized * y, *sums = job->vertical_first ? job->lines : out;
        size_t sums_stride = job->vertical_first ? line : resized;
        for (int row = 0; row < count; row++) {
            const uint8_t *rows = job->rows + stride * (down->first[y + row] - down->low);
            sum_rows(rows, stride, sums + sums_stride * row, down, y + row, stride);
        }
        if (job->vertical_first)
            resize_rows(sums, sums_stride, out, resized, count, across, job->out_width);
    }
}

static int run(const uint8_t *content, size_t size, Job *job) {
    Decoder decoder;
    prepare(&decoder);
    volatile int done = 0;
    if (!setjmp(decoder.failed)) {
        if (open_jpeg(&decoder, content, size)
                && job->left + job->width <= (int64_t)decoder.jpeg.width
                && job->top + job->height <= (int64_t)decoder.jpeg.height) {
            decode(&decoder, job);
            done = 1;
        }
    }
    lib.destroy(&decoder.jpeg);
    free(job->lines), free(job->rows);
    return done;
}

/* ---------------------------------------------------------------------------------------------
   Python */

static PyObject *load(PyObject *self, PyObject *args) {
    PyObject *path;
    int use_vectors;
    if (!PyArg_ParseTuple(args, "O&p", PyUnicode_FSConverter, &path, &use_vectors)) return NULL;
    void *handle = dlopen(PyBytes_AsString(path), RTLD_NOW | RTLD_LOCAL);
    Py_DECREF(path);
    vectors = use_vectors && has_avx2();
    static const char *names[] = {
        "jpeg_std_error", "jpeg_CreateDecompress", "jpeg_mem_src", "jpeg_read_header",
        "jpeg_start_decompress", "jpeg_crop_scanline", "jpeg_skip_scanlines",
        "jpeg_read_scanlines", "jpeg_destroy_decompress"};
    void *found[sizeof names / sizeof *names];
    _Static_assert(sizeof found == sizeof lib, "a function without a name");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!handle || !(found[i] = dlsym(handle, names[i]))) Py_RETURN_FALSE;
    memcpy(&lib, found, sizeof lib);
    Decoder decoder;
    prepare(&decoder);
    if (setjmp(decoder.failed)) Py_RETURN_FALSE; /* another version or size */
    lib.create(&decoder.jpeg, VERSION, sizeof(Jpeg));
    lib.destroy(&decoder.jpeg);
    Py_RETURN_TRUE;
}

static PyObject *read_size(PyObject *self, PyObject *args) {
    Py_buffer content;
    if (!PyArg_ParseTuple(args, "y*", &content)) return NULL;
    Decoder decoder;
    prepare(&decoder);
    volatile int fits = 0;
    if (!setjmp(decoder.failed)) fits = open_jpeg(&decoder, content.buf, content.len);
    unsigned width = decoder.jpeg.width, height = decoder.jpeg.height;
    lib.destroy(&decoder.jpeg);
    PyBuffer_Release(&content);
    if (!fits) Py_RETURN_NONE;
    return Py_BuildValue("(II)", width, height);
}

static PyObject *resize(PyObject *self, PyObject *args) {
    Py_buffer content, out;
    Job job = {0};
    float x0, y0, x1, y1;
    int right, bottom, width, height, window[4], cubic, flip, done = 0;
    if (!PyArg_ParseTuple(args, "y*w*(iiii)(ffff)(ii)(iiii)ppp", &content, &out, &job.left,
                          &job.top, &right, &bottom, &x0, &y0, &x1, &y1, &width, &height, window,
                          window + 1, window + 2, window + 3, &cubic, &flip, &job.vertical_first))
        return NULL;
    job.width = right - job.left, job.height = bottom - job.top;
    job.out_width = window[2] - window[0], job.out_height = window[3] - window[1];
    job.out = out.buf;
    if (job.left < 0 || job.top < 0 || job.width < 1 || job.height < 1 || x0 < 0 || y0 < 0
            || x1 > job.width || y1 > job.height || x0 >= x1 || y0 >= y1 || window[0] < 0
            || window[1] < 0 || window[2] > width || window[3] > height || job.out_width < 1
            || job.out_height < 1 || out.len != 3 * (Py_ssize_t)job.out_width * job.out_height + SLACK) {
        PyErr_SetString(PyExc_ValueError, "box, window or buffer do not fit the image");
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = make_taps(&job.across, job.width, x0, x1, width, window[0], window[2], cubic, flip)
            && make_taps(&job.down, job.height, y0, y1, height, window[1], window[3], cubic, 0)
            && run(content.buf, content.len, &job);
        free_taps(&job.across), free_taps(&job.down);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&content), PyBuffer_Release(&out);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(done);
}

static PyMethodDef methods[] = {
    {"load", load, METH_VARARGS, "Looks up libjpeg in a library and what it has loaded; returns success."},
    {"read_size", read_size, METH_VARARGS, "Returns (width, height) of a JPEG, or None."},
    {"resize", resize, METH_VARARGS, "Writes a resized region into a buffer; returns success."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg_regions", NULL, -1, methods};

PyMODINIT_FUNC PyInit__jpeg_regions(void) {
    PyObject *made = PyModule_Create(&module);
    if (made) PyModule_AddIntConstant(made, "SLACK", SLACK);
    return made;
}
