package probe

import (
	"debug/buildinfo"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"cri-dockerd/internal/proc"
)

// daemonName is the prefix of the program's file name, shared with older shims.
const daemonName = "cri-dockerd"

// daemons returns the running CRI daemons: root's processes of this name without a subcommand.
func (p *Prober) daemons() []proc.Process {
	all := p.proc.Find(func(name string) bool { return strings.HasPrefix(name, daemonName) })
	return slices.DeleteFunc(all, func(x proc.Process) bool {
		return len(x.Args) > 0 && x.Args[0] != "" && !strings.HasPrefix(x.Args[0], "-")
	})
}

// logDrivers returns the running log-driver processes.
func (p *Prober) logDrivers() []proc.Process {
	all := p.proc.Find(func(name string) bool { return strings.HasPrefix(name, daemonName) })
	return slices.DeleteFunc(all, func(x proc.Process) bool { return len(x.Args) == 0 || x.Args[0] != "log-driver" })
}

// isOurs reports whether a process runs this program, in this or another release. It compares the
// module in the build information of the program's file. An unreadable program counts as ours.
func (p *Prober) isOurs(x proc.Process) bool {
	own, known := debug.ReadBuildInfo()
	dir, err := p.proc.Open(strconv.Itoa(x.PID))
	if err != nil || !known {
		return true
	}
	defer dir.Close()

	file, err := dir.OpenFile("exe")
	if err != nil {
		return true
	}
	defer file.Close()

	if st, err := file.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxProgram {
		return false
	}

	other, err := buildinfo.Read(file)

	return err != nil || other.Main.Path == own.Main.Path
}
