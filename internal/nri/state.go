package nri

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/ttrpc"

	"cri-dockerd/internal/text"
)

// State describes the plugins for the status of the daemon.
type State struct {
	// Started is false while the daemon waits for the engine.
	Started bool
	Plugins []PluginState // by name
}

// PluginState describes a plugin. A dropped plugin stays in the State until it connects again.
type PluginState struct {
	Name        string // with index, as in 10-logger
	Connections int
	Failures    uint64 // calls
	LastError   string // of the last call, "" after a success
	Dropped     bool   // the last call got no response, and NRI's library drops such plugins
}

// State returns the plugins that are connected or have failed.
func (r *Runtime) State() State {
	s := State{Plugins: r.plugins.all()}
	select {
	case <-r.started:
		s.Started = true
	default:
	}
	return s
}

// pluginTable has the state of at most maxPlugins plugins. NRI's library does not report the names
// of connected plugins, so they are read from the registrations.
type pluginTable struct {
	mu      sync.Mutex // guards plugins
	plugins map[string]*PluginState
}

// change changes the state of a plugin.
func (t *pluginTable) change(name string, change func(*PluginState)) {
	t.mu.Lock()
	defer t.mu.Unlock()

	p := t.plugins[name]
	if p == nil {
		if len(t.plugins) >= maxPlugins {
			return
		}
		p = &PluginState{Name: name}
		t.plugins[name] = p
	}

	change(p)
	if p.Connections <= 0 && !p.Dropped {
		delete(t.plugins, name)
	}
}

// called records a call of a plugin.
func (t *pluginTable) called(name, event string, err error) {
	t.change(text.Clean(name, text.MaxName), func(p *PluginState) {
		p.LastError, p.Dropped = "", errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ttrpc.ErrClosed)
		if err != nil {
			p.Failures++
			p.LastError = event + ": " + text.Clean(err.Error(), text.MaxMessage)
		}
	})
}

func (t *pluginTable) all() []PluginState {
	t.mu.Lock()
	defer t.mu.Unlock()

	var out []PluginState
	for _, p := range t.plugins {
		out = append(out, *p)
	}
	slices.SortFunc(out, func(a, b PluginState) int { return strings.Compare(a.Name, b.Name) })

	return out
}

// session is the connection of one plugin.
type session struct {
	plugins *pluginTable

	mu   sync.Mutex // guards name
	name string     // "" before the registration and after the end
}

// sessionOption returns an option that watches the connections of plugins. NRI's library creates a
// server for each plugin.
func sessionOption(plugins *pluginTable) ttrpc.ServerOpt {
	return perServer(func() []ttrpc.ServerOpt {
		s := &session{plugins: plugins}
		return []ttrpc.ServerOpt{
			ttrpc.WithServerHandshaker(s),
			ttrpc.WithChainUnaryServerInterceptor(s.intercept, passEvictions),
		}
	})
}

// perServer returns an option that gives each server options of its own. C is a type that ttrpc
// does not export.
func perServer[C any, O ~func(C) error](create func() []O) O {
	return func(c C) error {
		for _, option := range create() {
			if err := option(c); err != nil {
				return err
			}
		}
		return nil
	}
}

// Handshake implements ttrpc.Handshaker.
func (s *session) Handshake(_ context.Context, conn net.Conn) (net.Conn, any, error) {
	return &sessionConn{Conn: conn, session: s}, nil, nil
}

// intercept is the interceptor of calls of the plugin. It takes the name from the registration.
func (s *session) intercept(
	ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method,
) (any, error) {
	if !strings.HasSuffix(info.FullMethod, "/RegisterPlugin") {
		return method(ctx, unmarshal)
	}

	var name string
	resp, err := method(ctx, func(v any) error {
		err := unmarshal(v)
		if m, ok := v.(*api.RegisterPluginRequest); ok && err == nil {
			name = text.Clean(m.GetPluginIdx()+"-"+m.GetPluginName(), text.MaxName)
		}
		return err
	})
	if err == nil {
		s.rename(name)
	}

	return resp, err
}

// rename sets the name of the plugin. "" is the end of the connection.
func (s *session) rename(name string) {
	s.mu.Lock()
	old := s.name
	s.name = name
	s.mu.Unlock()

	if old != "" {
		s.plugins.change(old, func(p *PluginState) { p.Connections-- })
	}
	if name != "" {
		s.plugins.change(name, func(p *PluginState) { p.Connections, p.Dropped = p.Connections+1, false })
	}
}

// sessionConn is a connection that reports its end.
type sessionConn struct {
	net.Conn
	session *session
}

// Close closes the connection.
func (c *sessionConn) Close() error {
	c.session.rename("")
	return c.Conn.Close()
}
