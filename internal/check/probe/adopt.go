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

// Adopted says where the daemon's flags came from.
type Adopted struct {
	Source   string            // in words
	Endpoint string            // of the CRI as a client dials it
	Unit     string            // of the daemon, without suffix; "" if there is none
	Command  shell.Line        // starts the daemon with these flags, without systemd
	Files    map[string]string // flag: the file of the unit in which it stands
	Mistake  finding.Mistake   // what is wrong with the unit's flags, while no daemon runs
	Given    bool              // check was given flags of the daemon

	daemon *proc.Process // the running one, nil if none was found
}

// units are the names of the daemon's unit: its own, and that of nodes made by kubespray.
func units() []string { return []string{"cri-docker", "cri-dockerd"} }

// Adopt sets the flags of given, which are those of cfg, that were not given on the command line as
// the daemon of this node has them: the running one or, while none runs, as its unit says. So
// `check` without flags is right on every node.
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
		argv = argv[1:] // the program
	}

	for _, w := range argv {
		if name, isFlag := strings.CutPrefix(w.text, "--"); isFlag {
			name, _, _ = strings.Cut(name, "=")
			a.Files[name] = w.file
		}
	}

	args := texts(argv)
	if a.daemon = p.running(ctx, cfg, given); a.daemon != nil {
		a.Source, args = fmt.Sprintf("the running daemon, process %d", a.daemon.PID), a.daemon.Args
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
		a.Source = "the command line of check, then " + a.Source
	}

	a.Endpoint = p.clientEndpoint(cfg.Endpoint, a.Unit)
	a.Command = startCommand(given, a.Endpoint)

	return a
}

// mistake is an error of parsing flags, with the file in which the flag stands.
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

// running is the daemon that serves the endpoint or, since systemd's sockets are systemd's, the
// first one that runs and is ours.
func (p *Prober) running(ctx context.Context, cfg *config.Config, given *pflag.FlagSet) *proc.Process {
	all := p.daemons()
	serves := 0
	if path, isUnix := strings.CutPrefix(cfg.Endpoint, "unix://"); isUnix {
		serves = p.peer(ctx, path)
	}

	for i := range all {
		if all[i].PID == serves {
			return &all[i]
		}
	}

	if f := given.Lookup("container-runtime-endpoint"); f != nil && f.Changed {
		return nil // another daemon than that one has flags of its own
	}

	for i := range all {
		if p.ours(all[i]) {
			return &all[i]
		}
	}

	return nil
}

// peer is the process of root that listens on a unix socket (SO_PEERCRED, unix(7)), 0 if none does.
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

// daemonFlags are the daemon's flags with their defaults.
func daemonFlags() *pflag.FlagSet {
	f := pflag.NewFlagSet("daemon", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	new(config.Config).Register(f)
	return f
}

// merge sets the flags of f that have not been set as a daemon's command line has them. What this
// release does not know is passed over: the daemon may be of another.
func merge(f *pflag.FlagSet, args []string) {
	theirs := daemonFlags()
	theirs.ParseErrorsAllowlist.UnknownFlags = true
	_ = theirs.Parse(args) // what was read before a mistake holds
	theirs.Visit(func(t *pflag.Flag) {
		mine := f.Lookup(t.Name)
		if mine == nil || mine.Changed {
			return
		}

		value := t.Value.String()
		if list, isList := t.Value.(pflag.SliceValue); isList {
			value = strings.Join(list.GetSlice(), ",")
		}

		_ = f.Set(t.Name, value) // it was read by the same rules
	})
}

const defaultSocket = "/run/cri-dockerd.sock"

// clientEndpoint is where a client finds what the daemon serves: for fd://, the socket of its
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

	// as kubeadm writes it
	return strings.Replace(endpoint, "unix:///run/cri-dockerd.sock", "unix:///var/run/cri-dockerd.sock", 1)
}

// startCommand is a command line with the daemon's flags that are not the defaults; without
// systemd, it makes its socket itself.
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
