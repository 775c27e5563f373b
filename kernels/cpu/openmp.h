/* Entry points of the OpenMP runtime that torch has loaded; openmp.py fills them in. */
struct moe_openmp {
    void (*parallel)(void (*body)(void *), void *argument, unsigned num_threads, unsigned flags);
    void (*barrier)(void);
    int (*thread_num)(void);
    int (*num_threads)(void);
};
