package engine

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// killRounds bounds how often a tree is listed anew that forks while it is killed.
const killRounds = 10

// process is one line of /proc/<pid>/stat, proc_pid_stat(5).
type process struct{ pid, parent, session int }

// killTree kills pid with its descendants and the members of its session, as far as they are in the
// container's cgroup, until none is left.
func killTree(proc string, pid int, container string) error {
	for range killRounds {
		targets := family(readProcesses(proc), pid)
		alive := 0
		var errs []error
		for _, target := range targets {
			killed, err := sendSignals(proc, target, container, unix.SIGKILL)
			if killed {
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

// hangUp does to a command what the loss of its terminal does (setpgid(2), credentials(7)): the
// kernel hangs up the others of the session when this first process of it ends.
func hangUp(proc string, pid int, container string) error {
	_, err := sendSignals(proc, pid, container, unix.SIGHUP, unix.SIGCONT)
	return err
}

// sendSignals sends signals through a pidfd, so that a PID that was given away meanwhile is not
// hit: the cgroup is read after the pidfd was opened. It returns false if the process has ended or
// is not in the container's cgroup.
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
			return false, nil //nolint:nilerr // it has ended meanwhile
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
			continue // ended meanwhile
		}

		// The name in brackets may hold anything; state, parent, group and session follow the last
		// bracket.
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

// The fields of /proc/PID/stat behind the program's name, and the flag of a process that is ending
// (proc_pid_stat(5); PF_EXITING, include/linux/sched.h).
const (
	statState = 0
	statFlags = 6
	isExiting = 0x4
)

// hasEnded reports whether a process has ended, be it reaped or not, or is ending. The first
// process of a PID namespace kills all others while it ends, and waits for them
// (pid_namespaces(7)).
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

// family is root, if it is there, with its descendants and the members of its session.
func family(all []process, root int) []int {
	in := map[int]bool{root: true}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if !in[p.pid] && (in[p.parent] || p.session == root) {
				in[p.pid], grown = true, true
			}
		}
	}

	var out []int
	for _, p := range all {
		if in[p.pid] {
			out = append(out, p.pid)
		}
	}

	return out
}
