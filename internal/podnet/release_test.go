package podnet

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/model"
)

// connected is a network with one pod and without plugins.
type connected struct {
	Noop
	pod string // "" after Del
}

func (c *connected) Connector() Connector { return c }

func (c *connected) Add(context.Context, Pod) ([]netip.Addr, error) { return nil, nil }
func (c *connected) Confirm(string) error                           { return nil }
func (c *connected) Check(context.Context, Pod) error               { return nil }
func (c *connected) Collect(context.Context) error                  { return nil }
func (c *connected) Adopt(string)                                   {}
func (c *connected) IPs(string) []netip.Addr                        { return nil }

func (c *connected) Del(_ context.Context, p Pod) error {
	if c.pod == p.ID {
		c.pod = ""
	}
	return nil
}

func (c *connected) Attached() []string {
	if c.pod == "" {
		return nil
	}
	return []string{c.pod}
}

// noPins has no pins.
type noPins struct{}

func (noPins) Create(map[string]string) (string, error)       { return "", errdefs.ErrNotImplemented }
func (noPins) Drop(string) error                              { return nil }
func (noPins) Sweep() error                                   { return nil }
func (noPins) Keep(model.ContainerID, string) (string, error) { return "", errdefs.ErrNotImplemented }
func (noPins) Pin(model.ContainerID, int) (string, error)     { return "", errdefs.ErrNotFound }
func (noPins) OpenPin(model.ContainerID) (*os.File, error)    { return nil, errdefs.ErrNotFound }
func (noPins) Path(model.ContainerID) string                  { return "" }
func (noPins) Joined(model.ContainerID, int) bool             { return false }
func (noPins) Addresses(model.ContainerID, int) []netip.Addr  { return nil }
func (noPins) Unpin(model.ContainerID) error                  { return nil }
func (noPins) List() []model.ContainerID                      { return nil }

var errBroken = errors.New("broken")

// TestDisconnectDoesNotTrustReclaim verifies that Disconnect does not accept any result of Reclaim,
// which spares running pods and may have failed for a reason that no longer exists.
func TestDisconnectDoesNotTrustReclaim(t *testing.T) {
	for name, result := range map[string]error{"spared": nil, "failed": errBroken} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sb := &model.Sandbox{ID: "aa", Running: true, NetworkMode: "none"}
				network := &connected{pod: string(sb.ID)}
				m := NewManager(ManagerConfig{
					Network:     network,
					Namespaces:  noPins{},
					Pins:        noPins{},
					Checkpoints: checkpoint.New(t.TempDir()),
					Log:         slog.New(slog.DiscardHandler),
				})

				held := make(chan struct{})
				m.releases.begin(t.Context(), sb.ID, byReclaim, func(context.Context) error { <-held; return result })

				done := make(chan error, 1)
				go func() { done <- m.Disconnect(t.Context(), sb) }()
				synctest.Wait() // it waits for the release of Reclaim
				close(held)
				if err := <-done; err != nil || network.pod != "" {
					t.Errorf("%v, attached %q", err, network.pod)
				}
			})
		})
	}
}
