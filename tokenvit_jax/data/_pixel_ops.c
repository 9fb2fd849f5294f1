/* Warps RGB images and changes their colours with exactly Pillow's pixels; pixel_ops.py is the only
   caller.

   Pixels are bytes r g b without padding. Blends are Pillow's: single precision, cut off towards
   zero. The functions use AVX2; supported() says whether this processor has it. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

enum { SLACK = 16 }; /* bytes that vectors read beyond the end of an image */

/* ---------------------------------------------------------------------------------------------
   Warps */

/* The cubic through four values, in Pillow's order of operations, for four channels. */
AVX2 static inline __m256d cubic(__m256d p1, __m256d p2, __m256d p3, __m256d p4, __m256d d) {
    __m256d sum = _mm256_add_pd(p3, _mm256_mul_pd(d, p4));
    sum = _mm256_add_pd(p2, _mm256_mul_pd(d, sum));
    return _mm256_add_pd(p1, _mm256_mul_pd(d, sum));
}

/* Reads four bytes: a pixel and one value of the next. */
AVX2 static inline __m128i load_pixel(const uint8_t *pixel) {
    int32_t rgbx;
    memcpy(&rgbx, pixel, 4);
    return _mm_cvtsi32_si128(rgbx);
}

/* Sums of four neighbours v1 to v4 times small integers, for each channel. */
AVX2 static inline __m256d combine(__m128i neighbours, int c1, int c2, int c3, int c4) {
    __m128i weights = _mm_set1_epi32((c1 & 255) | (c2 & 255) << 8 | (c3 & 255) << 16 | c4 * (1 << 24));
    __m128i pairs = _mm_maddubs_epi16(neighbours, weights);
    return _mm256_cvtepi32_pd(_mm_madd_epi16(pairs, _mm_set1_epi16(1)));
}

/* The cubic along a row through four pixels, the first at x[0]. */
AVX2 static inline __m256d cubic_of_row(const uint8_t *row, const int *x, int inside, __m256d dx) {
    const __m128i by_channel = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
    __m128i pixels;
    if (inside) {
        pixels = _mm_loadu_si128((const void *)(row + x[0]));
    } else { /* some are the pixel at the edge */
        uint8_t copies[16] = {0};
        for (int i = 0; i < 4; i++) memcpy(copies + 3 * i, row + x[i], 3);
        pixels = _mm_loadu_si128((const void *)copies);
    }
    pixels = _mm_shuffle_epi8(pixels, by_channel);
    return cubic(combine(pixels, 0, 1, 0, 0), combine(pixels, -1, 0, 1, 0),
                 combine(pixels, 2, -2, 1, -1), combine(pixels, -1, 1, -1, 1), dx);
}

AVX2 static inline __m256d cubic_of_column(const __m256d *v, __m256d dy) {
    __m256d fall = _mm256_sub_pd(v[0], v[1]);
    __m256d p3 = _mm256_sub_pd(_mm256_add_pd(_mm256_add_pd(fall, fall), v[2]), v[3]);
    __m256d p4 = _mm256_add_pd(_mm256_sub_pd(_mm256_sub_pd(v[1], v[0]), v[2]), v[3]);
    return cubic(v[1], _mm256_sub_pd(v[2], v[0]), p3, p4, dy);
}

static inline int clamp(int value, int size) {
    return value < 0 ? 0 : value < size ? value : size - 1;
}

/* The pixel at (xin, yin), interpolated bicubically. A cubic at distance 0 is its second value: the
   others need not be known. That holds for whole images that are shifted or sheared along an axis. */
AVX2 static inline int32_t cubic_pixel(const uint8_t *in, int width, int height, double xin,
                                       double yin) {
    xin -= 0.5, yin -= 0.5;
    int left = (int)floor(xin), top = (int)floor(yin);
    int inside = left >= 1 && left + 2 < width, x[4] = {3 * (left - 1), 3 * left};
    if (!inside)
        for (int i = 0; i < 4; i++) x[i] = 3 * clamp(left - 1 + i, width);
    size_t stride = 3 * (size_t)width;
    __m256d dx = _mm256_set1_pd(xin - left), v[4], result;
    if (yin == top) {
        result = cubic_of_row(in + stride * clamp(top, height), x, inside, dx);
    } else {
        for (int i = 0; i < 4; i++) {
            const uint8_t *row = in + stride * clamp(top - 1 + i, height);
            v[i] = xin == left ? _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(load_pixel(row + x[1])))
                               : cubic_of_row(row, x, inside, dx);
        }
        result = cubic_of_column(v, _mm256_set1_pd(yin - top));
    }
    __m128i sum = _mm256_cvttpd_epi32(result);
    return _mm_cvtsi128_si32(_mm_packus_epi16(_mm_packs_epi32(sum, sum), sum));
}

/* out(x, y) = in(matrix (x, y)); pixels from outside have the colour `fill`. */
AVX2 static void warp_image(const uint8_t *in, uint8_t *out, int width, int height,
                            const double *matrix, const uint8_t *fill) {
    int32_t outside = fill[0] | fill[1] << 8 | fill[2] << 16;
    double m[6];
    memcpy(m, matrix, sizeof m); /* `out` could be part of the matrix, for all the compiler knows */
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++, out += 3) {
            double xin = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2];
            double yin = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5];
            int inside = xin >= 0.0 && xin < width && yin >= 0.0 && yin < height;
            int32_t pixel = inside ? cubic_pixel(in, width, height, xin, yin) : outside;
            memcpy(out, &pixel, 3);
        }
    }
}

/* ---------------------------------------------------------------------------------------------
   Colours */

/* Pillow's blend: `from` plus factor times the way to `to`, cut off to an integer in [0, 255]. */
static inline uint8_t blend(int from, int to, float factor) {
    float sum = (float)from + factor * (float)(to - from);
    return sum <= 0.0f ? 0 : sum >= 255.0f ? 255 : (uint8_t)sum;
}

/* The same for eight integers of 32 bits; the results are in [0, 255]. */
AVX2 static inline __m256i blend_vector(__m256i from, __m256i to, __m256 factor) {
    __m256 way = _mm256_cvtepi32_ps(_mm256_sub_epi32(to, from));
    __m256 sum = _mm256_add_ps(_mm256_cvtepi32_ps(from), _mm256_mul_ps(factor, way));
    sum = _mm256_min_ps(_mm256_max_ps(sum, _mm256_setzero_ps()), _mm256_set1_ps(255.0f));
    return _mm256_cvttps_epi32(sum);
}

/* Pillow's grey level: ITU-R 601 with 16 fractional bits. */
enum { RED = 19595, GREEN = 38470, BLUE = 7471, HALF = 1 << 15 };

static inline int grey(const uint8_t *pixel) {
    return (RED * pixel[0] + GREEN * pixel[1] + BLUE * pixel[2] + HALF) >> 16;
}

/* Eight pixels, four in each half. */
AVX2 static inline __m256i load_8(const uint8_t *in) {
    __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const void *)in));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const void *)(in + 12)), 1);
}

/* A channel of eight pixels, in 32 bits each. */
AVX2 static inline __m256i channel(__m256i pixels, int number) {
    const __m256i reds = _mm256_setr_epi8(
        0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1,
        0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1);
    return _mm256_shuffle_epi8(pixels, _mm256_add_epi32(reds, _mm256_set1_epi32(number)));
}

AVX2 static inline __m256i grey_8(__m256i red, __m256i green, __m256i blue) {
    __m256i sum = _mm256_mullo_epi32(red, _mm256_set1_epi32(RED));
    sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(green, _mm256_set1_epi32(GREEN)));
    sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(blue, _mm256_set1_epi32(BLUE)));
    return _mm256_srli_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(HALF)), 16);
}

/* Blends every pixel with its grey level. */
AVX2 static void color_image(const uint8_t *in, uint8_t *out, size_t pixels, float factor) {
    const __m256i join = _mm256_setr_epi8(
        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    __m256 factors = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + 10 <= pixels; i += 8, in += 24, out += 24) { /* 28 bytes are read and written */
        __m256i rgb = load_8(in);
        __m256i red = channel(rgb, 0), green = channel(rgb, 1), blue = channel(rgb, 2);
        __m256i level = grey_8(red, green, blue);
        red = blend_vector(level, red, factors);
        green = _mm256_slli_epi32(blend_vector(level, green, factors), 8);
        blue = _mm256_slli_epi32(blend_vector(level, blue, factors), 16);
        rgb = _mm256_shuffle_epi8(_mm256_or_si256(_mm256_or_si256(red, green), blue), join);
        _mm_storeu_si128((void *)out, _mm256_castsi256_si128(rgb));
        _mm_storeu_si128((void *)(out + 12), _mm256_extracti128_si256(rgb, 1));
    }
    for (; i < pixels; i++, in += 3, out += 3)
        for (int c = 0; c < 3; c++) out[c] = blend(grey(in), in[c], factor);
}

AVX2 static long long sum_greys(const uint8_t *in, size_t pixels) {
    long long sum = 0;
    size_t i = 0;
    while (i + 10 <= pixels) {
        __m256i sums = _mm256_setzero_si256();
        size_t end = pixels - i < 1 << 20 ? pixels - 9 : i + (1 << 20); /* below 32 bits */
        for (; i < end; i += 8, in += 24) {
            __m256i rgb = load_8(in);
            sums = _mm256_add_epi32(sums, grey_8(channel(rgb, 0), channel(rgb, 1), channel(rgb, 2)));
        }
        int32_t parts[8];
        _mm256_storeu_si256((void *)parts, sums);
        for (int part = 0; part < 8; part++) sum += parts[part];
    }
    for (; i < pixels; i++, in += 3) sum += grey(in);
    return sum;
}

/* Sixteen values, each plus those above and below it. */
AVX2 static inline __m256i column(const uint8_t *in, size_t stride) {
    __m256i above = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(in - stride)));
    __m256i below = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(in + stride)));
    __m256i here = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)in));
    return _mm256_add_epi16(_mm256_add_epi16(above, below), here);
}

/* Sixteen smoothed values: (the sum of 3 x 3 + 4 x the centre) / 13, rounded; the product with
   5042 / 2^16 divides all such sums exactly. */
AVX2 static inline __m256i smooth_vector(const uint8_t *in, size_t stride, __m256i here) {
    __m256i sum = _mm256_add_epi16(column(in - 3, stride), column(in + 3, stride));
    sum = _mm256_add_epi16(sum, column(in, stride));
    sum = _mm256_add_epi16(sum, _mm256_slli_epi16(here, 2));
    return _mm256_mulhi_epu16(_mm256_add_epi16(sum, _mm256_set1_epi16(6)), _mm256_set1_epi16(5042));
}

static inline int smooth(const uint8_t *in, size_t stride) {
    int sum = 4 * in[0];
    for (int x = -3; x <= 3; x += 3) sum += in[x - (ptrdiff_t)stride] + in[x] + in[x + stride];
    return (sum + 6) / 13;
}

/* Blends every pixel, except those of the border, with a smoothed one. */
AVX2 static void sharpen_image(const uint8_t *in, uint8_t *out, int width, int height,
                               float factor) {
    size_t stride = 3 * (size_t)width;
    __m256 factors = _mm256_set1_ps(factor);
    memcpy(out, in, stride * height);
    for (int y = 1; y + 1 < height; y++) {
        const uint8_t *row = in + stride * y;
        uint8_t *result = out + stride * y;
        size_t x = 3;
        for (; x + 3 + 16 <= stride; x += 16) {
            __m256i here = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(row + x)));
            __m256i base = smooth_vector(row + x, stride, here), half[2];
            for (int i = 0; i < 2; i++) {
                __m128i from = i ? _mm256_extracti128_si256(base, 1) : _mm256_castsi256_si128(base);
                __m128i to = i ? _mm256_extracti128_si256(here, 1) : _mm256_castsi256_si128(here);
                half[i] = blend_vector(_mm256_cvtepu16_epi32(from), _mm256_cvtepu16_epi32(to), factors);
            }
            __m256i words = _mm256_packs_epi32(half[0], half[1]);
            words = _mm256_permute4x64_epi64(words, 0xd8); /* the packing interleaves the halves */
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words),
                                             _mm256_extracti128_si256(words, 1));
            _mm_storeu_si128((void *)(result + x), bytes);
        }
        for (; x + 3 < stride; x++) result[x] = blend(smooth(row + x, stride), row[x], factor);
    }
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
enum { SLACK = 0 };
#define warp_image(in, out, width, height, matrix, fill) ((void)0)
#define color_image(in, out, pixels, factor) ((void)0)
#define sum_greys(in, pixels) 0
#define sharpen_image(in, out, width, height, factor) ((void)0)
static int has_avx2(void) { return 0; }
#endif

/* Replaces every value by its entry in the table of its channel. */
static void map_image(const uint8_t *in, uint8_t *out, size_t pixels, const uint8_t *tables) {
    for (size_t i = 0; i < pixels; i++, in += 3, out += 3) {
        out[0] = tables[in[0]];
        out[1] = tables[256 + in[1]];
        out[2] = tables[512 + in[2]];
    }
}

/* Counts the values of each channel. Neighbours are counted apart: they are often equal, and a
   counter waits for its last change. */
static void count_levels(const uint8_t *in, size_t pixels, int64_t *counts) {
    int64_t odd[3 * 256] = {0};
    memset(counts, 0, sizeof odd);
    for (size_t i = 0; i < pixels; i++, in += 3) {
        int64_t *to = i % 2 ? odd : counts;
        to[in[0]]++, to[256 + in[1]]++, to[512 + in[2]]++;
    }
    for (int i = 0; i < 3 * 256; i++) counts[i] += odd[i];
}

/* ---------------------------------------------------------------------------------------------
   Python: functions take buffers of the input and of the output, (H, W, 3) */

static PyObject *supported(PyObject *self, PyObject *none) { return PyBool_FromLong(has_avx2()); }

/* Releases the buffers; returns None, or raises ValueError if they did not fit. */
static PyObject *finish(Py_buffer *in, Py_buffer *out, int fits) {
    PyBuffer_Release(in);
    if (out) PyBuffer_Release(out);
    if (PyErr_Occurred()) return NULL;
    if (fits) Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "buffers do not fit the size");
    return NULL;
}

static int is_size(const Py_buffer *in, int width, int height) {
    return width > 0 && height > 0 && in->len == 3 * (Py_ssize_t)width * height;
}

static PyObject *warp(PyObject *self, PyObject *args) {
    Py_buffer in, out;
    int width, height;
    double m[6];
    uint8_t fill[3];
    if (!PyArg_ParseTuple(args, "y*w*(ii)(dddddd)(bbb)", &in, &out, &width, &height, m, m + 1, m + 2,
                          m + 3, m + 4, m + 5, fill, fill + 1, fill + 2))
        return NULL;
    int fits = is_size(&in, width, height) && in.len == out.len;
    uint8_t *padded = fits ? calloc(in.len + SLACK, 1) : NULL;
    if (fits && !padded) PyErr_NoMemory();
    if (padded) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(padded, in.buf, in.len);
        warp_image(padded, out.buf, width, height, m, fill);
        free(padded);
        Py_END_ALLOW_THREADS
    }
    return finish(&in, &out, fits);
}

static PyObject *color(PyObject *self, PyObject *args) {
    Py_buffer in, out;
    float factor;
    if (!PyArg_ParseTuple(args, "y*w*f", &in, &out, &factor)) return NULL;
    int fits = in.len == out.len && in.len % 3 == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        color_image(in.buf, out.buf, in.len / 3, factor);
        Py_END_ALLOW_THREADS
    }
    return finish(&in, &out, fits);
}

static PyObject *sharpness(PyObject *self, PyObject *args) {
    Py_buffer in, out;
    int width, height;
    float factor;
    if (!PyArg_ParseTuple(args, "y*w*(ii)f", &in, &out, &width, &height, &factor)) return NULL;
    int fits = is_size(&in, width, height) && in.len == out.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        sharpen_image(in.buf, out.buf, width, height, factor);
        Py_END_ALLOW_THREADS
    }
    return finish(&in, &out, fits);
}

static PyObject *map_levels(PyObject *self, PyObject *args) {
    Py_buffer in, out, tables;
    if (!PyArg_ParseTuple(args, "y*w*y*", &in, &out, &tables)) return NULL;
    int fits = in.len == out.len && in.len % 3 == 0 && tables.len == 3 * 256;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        map_image(in.buf, out.buf, in.len / 3, tables.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&tables);
    return finish(&in, &out, fits);
}

static PyObject *histogram(PyObject *self, PyObject *args) {
    Py_buffer in, counts;
    if (!PyArg_ParseTuple(args, "y*w*", &in, &counts)) return NULL;
    int fits = in.len % 3 == 0 && counts.len == 3 * 256 * (Py_ssize_t)sizeof(int64_t);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        count_levels(in.buf, in.len / 3, counts.buf);
        Py_END_ALLOW_THREADS
    }
    return finish(&in, &counts, fits);
}

static PyObject *grey_sum(PyObject *self, PyObject *args) {
    Py_buffer in;
    if (!PyArg_ParseTuple(args, "y*", &in)) return NULL;
    long long sum = sum_greys(in.buf, in.len / 3);
    PyBuffer_Release(&in);
    return PyLong_FromLongLong(sum);
}

static PyMethodDef methods[] = {
    {"supported", supported, METH_NOARGS, "Returns whether this processor has AVX2."},
    {"warp", warp, METH_VARARGS, "Writes an affine, bicubic warp."},
    {"color", color, METH_VARARGS, "Writes a blend of each pixel with its grey level."},
    {"sharpness", sharpness, METH_VARARGS, "Writes a blend with the smoothed image."},
    {"map_levels", map_levels, METH_VARARGS, "Writes the entries of three tables."},
    {"histogram", histogram, METH_VARARGS, "Writes the numbers of the 3 x 256 values, int64."},
    {"grey_sum", grey_sum, METH_VARARGS, "Returns the sum of the pixels' grey levels."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pixel_ops", NULL, -1, methods};

PyMODINIT_FUNC PyInit__pixel_ops(void) { return PyModule_Create(&module); }
