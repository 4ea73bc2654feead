package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/shell"
)

// Adopted describes the origin of the daemon's flags.
type Adopted struct {
	Source   string            // description of the origin
	Endpoint string            // of the CRI, in a client's form
	Unit     string            // systemd unit without suffix; "" if there is none
	Command  shell.Line        // starts the daemon with these flags, without systemd
	Files    map[string]string // flag name: the unit's file with the flag
	Mistake  finding.Mistake   // error in the unit's flags, unless a daemon is running
	Given    bool              // the command line of check has flags of the daemon

	daemon *proc.Process // nil if no daemon is running
}

// units returns the possible names of the daemon's unit: its own, and kubespray's.
func units() []string { return []string{"cri-docker", "cri-dockerd"} }

// Adopt copies the flags of this node's daemon to given, except for flags set on the command line.
// given are the flags of cfg. The flags come from the running daemon, otherwise from its unit. This
// makes `check` without flags work on every node.
func (p *Prober) Adopt(ctx context.Context, cfg *config.Config, given *pflag.FlagSet) Adopted {
	a := Adopted{Files: map[string]string{}, Source: "the defaults"}
	var argv []word
	for _, unit := range units() {
		if argv = p.command(unit + ".service"); argv != nil {
			a.Unit, a.Source = unit, unit+".service"
			break
		}
	}

	if len(argv) > 0 {
		argv = argv[1:] // skip the program
	}

	for _, w := range argv {
		if name, isFlag := strings.CutPrefix(w.text, "--"); isFlag {
			name, _, _ = strings.Cut(name, "=")
			a.Files[name] = w.file
		}
	}

	args := texts(argv)
	if a.daemon = p.running(ctx, cfg, given); a.daemon != nil {
		a.Source, args = fmt.Sprintf("the running daemon (process %d)", a.daemon.PID), a.daemon.Args
	}

	known := daemonFlags()
	given.Visit(func(f *pflag.Flag) { a.Given = a.Given || known.Lookup(f.Name) != nil })
	if a.daemon == nil && len(args) > 0 {
		if err := known.Parse(args); err != nil {
			a.Mistake = mistake(err, known, a.Files)
		}
	}

	merge(given, args)
	if a.Given {
		a.Source = "the command line of check and " + a.Source
	}

	a.Endpoint = p.clientEndpoint(cfg.Endpoint, a.Unit)
	a.Command = startCommand(given, a.Endpoint)

	return a
}

// mistake converts an error of the flag parser and adds the file with the flag.
func mistake(err error, known *pflag.FlagSet, files map[string]string) finding.Mistake {
	m := finding.Mistake{Error: err.Error()}
	var unknown *pflag.NotExistError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		m.Flag = unknown.GetSpecifiedName()
		m.Nearest = config.Nearest(known, m.Flag)
	case errors.As(err, &invalid):
		m.Flag = invalid.GetFlag().Name
	}

	m.File = files[m.Flag]

	return m
}

func texts(words []word) []string {
	var out []string
	for _, w := range words {
		out = append(out, w.text)
	}
	return out
}

// running returns the daemon listening on the endpoint. systemd owns the sockets of socket units;
// in that case running returns the first process of this program.
func (p *Prober) running(ctx context.Context, cfg *config.Config, given *pflag.FlagSet) *proc.Process {
	all := p.daemons()
	listener := 0
	if path, isUnix := strings.CutPrefix(cfg.Endpoint, "unix://"); isUnix {
		listener = p.peer(ctx, path)
	}

	for i := range all {
		if all[i].PID == listener {
			return &all[i]
		}
	}

	if f := given.Lookup("container-runtime-endpoint"); f != nil && f.Changed {
		return nil // any other daemon has different flags
	}

	for i := range all {
		if p.isOurs(all[i]) {
			return &all[i]
		}
	}

	return nil
}

// peer returns the process ID of root's listener on a unix socket (SO_PEERCRED, unix(7)), or 0.
func (p *Prober) peer(ctx context.Context, path string) int {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()

	c, _, err := dial(ctx, path)
	if err != nil {
		return 0
	}
	defer c.Close()

	cred, err := rootonly.Peer(c)
	if err != nil {
		return 0
	}

	return int(cred.Pid)
}

// daemonFlags returns the daemon's flags with their defaults.
func daemonFlags() *pflag.FlagSet {
	f := pflag.NewFlagSet("daemon", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	new(config.Config).Register(f)
	return f
}

// merge copies flags from a daemon's command line to f, except for flags already set. It ignores
// unknown flags because the daemon may be another release.
func merge(f *pflag.FlagSet, args []string) {
	source := daemonFlags()
	source.ParseErrorsAllowlist.UnknownFlags = true
	_ = source.Parse(args) // flags before an error are valid
	source.Visit(func(s *pflag.Flag) {
		target := f.Lookup(s.Name)
		if target == nil || target.Changed {
			return
		}

		value := s.Value.String()
		if list, isList := s.Value.(pflag.SliceValue); isList {
			value = strings.Join(list.GetSlice(), ",")
		}

		_ = f.Set(s.Name, value) // source has validated the value
	})
}

const defaultSocket = "/run/cri-dockerd.sock"

// clientEndpoint returns the daemon's endpoint in a client's form: for fd://, the path in its
// socket unit.
func (p *Prober) clientEndpoint(endpoint, unit string) string {
	switch {
	case strings.HasPrefix(endpoint, "fd:"):
		path := defaultSocket
		for _, s := range p.settings(unit + ".socket") {
			if s.key == "ListenStream" && s.value != "" {
				path = strings.ReplaceAll(s.value, "%t", "/run")
			}
		}
		endpoint = "unix://" + path

	case strings.HasPrefix(endpoint, "/"):
		endpoint = "unix://" + endpoint
	}

	// kubeadm's spelling
	return strings.Replace(endpoint, "unix:///run/cri-dockerd.sock", "unix:///var/run/cri-dockerd.sock", 1)
}

// startCommand returns a command line with the daemon's non-default flags. Without systemd, the
// daemon creates the socket itself, so endpoint replaces fd://.
func startCommand(f *pflag.FlagSet, endpoint string) shell.Line {
	self, err := os.Executable()
	if err != nil {
		self = daemonName
	}

	var options []shell.Option
	known := daemonFlags()
	f.Visit(func(g *pflag.Flag) {
		if known.Lookup(g.Name) == nil {
			return
		}

		value := g.Value.String()
		if list, isList := g.Value.(pflag.SliceValue); isList {
			value = strings.Join(list.GetSlice(), ",")
		}
		if strings.HasPrefix(value, "fd:") {
			value = endpoint
		}

		options = append(options, shell.Option{Name: g.Name, Value: value})
	})

	return shell.Run(self, options...)
}
