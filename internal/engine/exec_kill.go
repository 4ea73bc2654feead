package engine

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// killRounds bounds the number of attempts to kill a process tree, which may fork meanwhile.
const killRounds = 10

// process has fields of /proc/<pid>/stat, proc_pid_stat(5).
type process struct{ pid, parent, session int }

// killTree kills pid, its descendants and the members of its session. It repeats this until no
// process remains, and kills only processes in the container's cgroup.
func killTree(proc string, pid int, container string) error {
	for range killRounds {
		targets := processTree(readProcesses(proc), pid)
		alive := 0
		var errs []error
		for _, target := range targets {
			sent, err := sendSignals(proc, target, container, unix.SIGKILL)
			if sent {
				alive++
			}
			errs = append(errs, err)
		}

		if alive == 0 {
			return errors.Join(errs...)
		}
	}

	return nil
}

// hangUp sends a command the signals for a lost terminal (setpgid(2), credentials(7)). When this
// session leader exits, the kernel hangs up the other processes of the session.
func hangUp(proc string, pid int, container string) error {
	_, err := sendSignals(proc, pid, container, unix.SIGHUP, unix.SIGCONT)
	return err
}

// sendSignals sends signals through a pidfd. It reads the cgroup after opening the pidfd, so it
// never signals a process with a reused PID. It returns false if the process has ended or is not in
// the container's cgroup.
func sendSignals(proc string, pid int, container string, signals ...unix.Signal) (bool, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer unix.Close(fd)

	cgroup, err := os.ReadFile(proc + "/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil || !strings.Contains(string(cgroup), container) {
		return false, nil
	}

	for _, sig := range signals {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
			return false, nil //nolint:nilerr // the process has ended in the meantime
		}
	}

	return true, nil
}

func readProcesses(proc string) []process {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}

	var all []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}

		stat, err := os.ReadFile(proc + "/" + e.Name() + "/stat")
		if err != nil {
			continue // the process has ended in the meantime
		}

		// The name in parentheses may contain any character. State, parent, group and session
		// follow the last parenthesis.
		_, rest, ok := cutLast(string(stat), ") ")
		f := strings.Fields(rest)
		if !ok || len(f) < 4 || f[0] == "Z" {
			continue
		}

		parent, _ := strconv.Atoi(f[1])
		session, _ := strconv.Atoi(f[3])
		all = append(all, process{pid, parent, session})
	}

	return all
}

// processesIn returns the processes in the control group of a container (cgroups(7)), by its ID.
func processesIn(proc string, container string) (pids []int) {
	for _, p := range readProcesses(proc) {
		groups, err := os.ReadFile(proc + "/" + strconv.Itoa(p.pid) + "/cgroup")
		if err == nil && strings.Contains(string(groups), container) {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// Indexes of fields in /proc/PID/stat after the program's name (proc_pid_stat(5)), and the flag of
// an exiting process (PF_EXITING, include/linux/sched.h).
const (
	statState = 0
	statFlags = 6
	isExiting = 0x4
)

// hasEnded reports whether a process has ended, reaped or not, or is exiting. During its exit,
// process 1 of a PID namespace kills all others and waits for them (pid_namespaces(7)).
func hasEnded(proc string, pid int) bool {
	stat, err := os.ReadFile(proc + "/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}

	_, rest, _ := cutLast(string(stat), ") ")
	f := strings.Fields(rest)
	if len(f) <= statFlags {
		return false
	}

	flags, _ := strconv.ParseUint(f[statFlags], 10, 64)

	return f[statState] == "Z" || f[statState] == "X" || flags&isExiting != 0
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// processTree returns the PIDs of root, its descendants and the members of its session, as far as
// they exist.
func processTree(all []process, root int) []int {
	members := map[int]bool{root: true}
	for changed := true; changed; {
		changed = false
		for _, p := range all {
			if !members[p.pid] && (members[p.parent] || p.session == root) {
				members[p.pid], changed = true, true
			}
		}
	}

	var pids []int
	for _, p := range all {
		if members[p.pid] {
			pids = append(pids, p.pid)
		}
	}

	return pids
}
