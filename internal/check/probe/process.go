package probe

import (
	"debug/buildinfo"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
)

// process is a running program.
type process struct {
	pid     int
	program string   // the file, as the kernel says it, else as it was called
	args    []string // without the program's name
}

// processes are those in our PID namespace whose program is called name, or with exact unset begins so: containers' are not ours to judge.
func (p *Prober) processes(name string, exact bool) []process {
	depth := p.depth("/proc/self")
	var found []process
	for _, dir := range p.glob("/proc/[0-9]*") {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		argv := strings.Split(strings.TrimSuffix(p.readRaw(dir+"/cmdline"), "\x00"), "\x00") // proc_pid_cmdline(5)
		base := filepath.Base(argv[0])
		if base != name && (exact || !strings.HasPrefix(base, name)) {
			continue
		}
		if p.depth(dir) != depth {
			continue
		}
		x := process{pid: pid, program: argv[0], args: argv[1:]}
		if exe, err := os.Readlink(p.path(dir + "/exe")); err == nil {
			x.program = strings.TrimSuffix(exe, " (deleted)")
		}
		found = append(found, x)
	}
	slices.SortFunc(found, func(a, b process) int { return a.pid - b.pid })
	return found
}

// depth is how many PID namespaces deep a process is (NSpid of proc_pid_status(5)); those in namespaces below ours are seen, too.
func (p *Prober) depth(dir string) int {
	for line := range strings.Lines(p.readRaw(dir + "/status")) {
		if pids, found := strings.CutPrefix(line, "NSpid:"); found {
			return len(strings.Fields(pids))
		}
	}
	return 0
}

func (p *Prober) readRaw(file string) string {
	b, err := os.ReadFile(p.path(file))
	if err != nil {
		return "" // it has ended
	}
	return string(b)
}

// daemonName begins the name of this program's file, as of its ancestors'.
const daemonName = "cri-dockerd"

// daemons are the running CRI daemons: what is called so and was not given a subcommand.
func (p *Prober) daemons() []process {
	return slices.DeleteFunc(p.processes(daemonName, false), func(x process) bool {
		return len(x.args) > 0 && x.args[0] != "" && !strings.HasPrefix(x.args[0], "-")
	})
}

// ours says whether a program is this one, perhaps of another release, by the module that stands in it. What cannot be read is given the benefit of
// the doubt.
func (p *Prober) ours(file string) bool {
	own, known := debug.ReadBuildInfo()
	other, err := buildinfo.ReadFile(p.path(file))
	return err != nil || !known || other.Main.Path == own.Main.Path
}
