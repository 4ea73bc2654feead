package probe

import (
	"debug/buildinfo"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"cri-dockerd/internal/proc"
)

// daemonName begins the name of this program's file, as of its ancestors'.
const daemonName = "cri-dockerd"

// daemons are the running CRI daemons: programs of that name that were given no subcommand. Only
// processes of root on this host count.
func (p *Prober) daemons() []proc.Process {
	all := p.proc.Find(func(name string) bool { return strings.HasPrefix(name, daemonName) })
	return slices.DeleteFunc(all, func(x proc.Process) bool {
		return len(x.Args) > 0 && x.Args[0] != "" && !strings.HasPrefix(x.Args[0], "-")
	})
}

// ours reports whether a process runs this program, perhaps of another release, by the module in
// its build information. The program is read, not run. If it cannot be read, it counts as ours.
func (p *Prober) ours(x proc.Process) bool {
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
