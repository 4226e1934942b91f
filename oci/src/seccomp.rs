//! The default seccomp profile: which system calls a container that is not privileged may make.
//!
//! Everything is refused (EPERM) that is not listed; what a capability is needed for is listed with the capability. The
//! lists are those of containerd and Docker. A name that the runtime's libseccomp does not know is left out by the runtime.

use serde_json::{Value, json};

/// Allowed to everybody. Since Linux 4.8 ptrace cannot be used to get around a filter.
const ALWAYS: &str = "accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 \
    clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
    clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 \
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
    epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 \
    fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl \
    fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 \
    fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait \
    futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32 geteuid \
    geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid \
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit get_robust_list \
    getrusage getsid getsockname getsockopt get_thread_area gettid gettimeofday getuid getuid32 getxattr \
    getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel ioctl io_destroy \
    io_getevents io_pgetevents io_pgetevents_time64 ioprio_get ioprio_set io_setup io_submit ipc kill \
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link \
    linkat listen listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr \
    lsm_get_self_attr lsm_list_modules lsm_set_self_attr lstat lstat64 madvise membarrier memfd_create \
    memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall map_shadow_stack mmap mmap2 \
    mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend \
    mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall \
    munmap name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open \
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl \
    pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 \
    read readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg \
    remap_file_pages removexattr removexattrat rename renameat renameat2 restart_syscall rmdir rseq \
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam \
    sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval \
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler \
    sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 \
    sendmmsg sendmsg sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups \
    setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid \
    setresuid32 setreuid setreuid32 setrlimit set_robust_list setsid setsockopt set_thread_area \
    set_tid_address setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack \
    signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 \
    statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create \
    timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 \
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill \
    truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat \
    utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev process_vm_readv \
    process_vm_writev ptrace";

/// Allowed with a capability.
const WITH: &[(&str, &str)] = &[
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr \
         move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount \
         umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// The kernel's ABIs that a processor runs, and what is allowed on it alone.
const ARCHITECTURES: &[(&str, &[&str], &str)] = &[
    ("x86_64", &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], "arch_prctl modify_ldt"),
    (
        "aarch64",
        &["SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64"],
        "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    ),
    ("riscv64", &["SCMP_ARCH_RISCV64"], "riscv_flush_icache riscv_hwprobe"),
    ("powerpc64", &[], "sync_file_range2 swapcontext"),
    (
        "s390x",
        &["SCMP_ARCH_S390", "SCMP_ARCH_S390X"],
        "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr",
    ),
];

/// Flags of clone that make a namespace.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// Address families that are left out of socket: AF_ALG, and AF_VSOCK, which reaches beyond the container.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;
/// Execution domains that personality may set: Linux with and without randomization and 32 bits, and asking.
const PERSONALITIES: [u64; 5] = [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];
const ENOSYS: u32 = 38;

/// The profile for a process with these capabilities in its bounding set, as `linux.seccomp` of a runtime spec.
pub fn default_profile(capabilities: &[String]) -> Value {
    let has = |name: &str| capabilities.iter().any(|capability| capability == name);
    let allow = |names: &str| json!({"names": names.split_whitespace().collect::<Vec<_>>(), "action": "SCMP_ACT_ALLOW"});
    let allow_if = |name: &str, index: u32, op: &str, value: u64, two: u64| {
        let mut condition = json!({"index": index, "value": value, "op": op});
        if op == "SCMP_CMP_MASKED_EQ" {
            condition["valueTwo"] = two.into();
        }
        json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]})
    };
    let mut calls = vec![
        allow(ALWAYS),
        allow_if("socket", 0, "SCMP_CMP_LT", AF_ALG, 0),
        allow_if("socket", 0, "SCMP_CMP_EQ", AF_ALG + 1, 0),
        allow_if("socket", 0, "SCMP_CMP_GT", AF_VSOCK, 0),
    ];
    calls.extend(PERSONALITIES.map(|domain| allow_if("personality", 0, "SCMP_CMP_EQ", domain, 0)));
    calls.extend(WITH.iter().filter(|(capability, _)| has(capability)).map(|(_, names)| allow(names)));
    if !has("CAP_SYS_ADMIN") {
        // s390 has the flags in the second place.
        let flags = u32::from(std::env::consts::ARCH == "s390x");
        calls.push(allow_if("clone", flags, "SCMP_CMP_MASKED_EQ", NEW_NAMESPACES, 0));
        // Its flags are in memory, where no filter sees them; ENOSYS sends the C library to clone.
        calls.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}));
    }
    let here = ARCHITECTURES.iter().find(|(name, ..)| *name == std::env::consts::ARCH);
    let architectures = here.map_or(&[][..], |(_, abis, _)| abis);
    calls.extend(here.map(|(_, _, names)| allow(names)));
    json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures, "syscalls": calls})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: &Value) -> Vec<&str> {
        let calls = profile["syscalls"].as_array().unwrap().iter();
        calls.flat_map(|call| call["names"].as_array().unwrap()).filter_map(Value::as_str).collect()
    }

    #[test]
    fn capabilities_decide() {
        let plain = default_profile(&[]);
        assert!(names(&plain).contains(&"openat2"));
        for refused in ["mount", "unshare", "reboot", "keyctl", "bpf", "io_uring_setup", "userfaultfd"] {
            assert!(!names(&plain).contains(&refused), "{refused}");
        }
        let clone3 = plain["syscalls"].as_array().unwrap().iter().find(|call| call["names"][0] == "clone3");
        assert_eq!(clone3.unwrap()["errnoRet"], ENOSYS);
        let admin = default_profile(&["CAP_SYS_ADMIN".into()]);
        assert!(names(&admin).contains(&"mount"));
        assert!(!admin.to_string().contains("errnoRet"), "clone3 is not refused");
    }

    #[test]
    fn no_name_is_listed_twice() {
        let mut all: Vec<&str> = ALWAYS.split_whitespace().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
