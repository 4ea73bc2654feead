package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// With Docker's systemd driver, a container is a scope of systemd. The control group of a scope has
// a known path. So the shim creates it as with the other driver, starts the pause in it, and then
// has systemd take over group and process (org.freedesktop.systemd1(5), StartTransientUnit).

const (
	scopeSuffix = ".scope"
	sliceSuffix = ".slice"
	// defaultSlice is the slice of containers without one, as with runc.
	defaultSlice = "system.slice"
	// systemdTimeout bounds a job of systemd, including a reexecution of systemd. A scope starts in
	// some milliseconds.
	systemdTimeout = 10 * time.Second
	// systemdInterval is the time between two attempts to connect, or two reads of a state.
	systemdInterval = 50 * time.Millisecond
	// noSuchUnit is the error for a unit that has ended, unitExists that for one of this name.
	noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"
	unitExists = "org.freedesktop.systemd1.UnitExists"
)

// maxUnitName is UNIT_NAME_MAX of systemd, in bytes.
const maxUnitName = 255

// scopePath returns the path of a scope's control group. cgroupsPath is "slice:prefix:name", as
// Docker writes it for the systemd driver.
func scopePath(cgroupsPath string) (string, error) {
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 {
		return "", fmt.Errorf("%q is not slice:prefix:name", cgroupsPath)
	}

	unit := parts[1] + "-" + parts[2] + scopeSuffix
	if parts[1] == "" || parts[2] == "" || strings.ContainsAny(unit, "/\x00") || len(unit) > maxUnitName {
		return "", fmt.Errorf("%q is not the name of a unit", unit)
	}

	slice, err := slicePath(parts[0])

	return path.Join("/", slice, unit), err
}

// slicePath returns the path of a slice: a-b.slice is in a.slice (systemd.slice(5)).
func slicePath(slice string) (string, error) {
	switch slice {
	case "":
		return defaultSlice, nil
	case "-" + sliceSuffix:
		return "", nil // the root
	}

	name, ok := strings.CutSuffix(slice, sliceSuffix)
	if !ok || strings.ContainsAny(slice, "/\x00") || len(slice) > maxUnitName {
		return "", fmt.Errorf("%q is not the name of a slice", slice)
	}

	var dir, prefix string
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("%q is not the name of a slice", slice)
		}
		prefix += part
		dir = path.Join(dir, prefix+sliceSuffix)
		prefix += "-"
	}

	return dir, nil
}

// scope is the control group of a scope.
type scope struct {
	group
	path   string
	limits *specs.LinuxResources
}

// unit returns the name of the scope.
func (s scope) unit() string { return path.Base(s.path) }

// add moves a process into the group, and lets systemd manage both. systemd may replace the limits
// by defaults of its own, so add writes them once more. With cgroup v1 it may also have moved the
// process while it created the slice (see ownHierarchies).
func (s scope) add(ctx context.Context, pid int) error {
	if err := s.group.add(ctx, pid); err != nil {
		return err
	}

	repeated := false
	if err := withSystemd(ctx, func(ctx context.Context, c *dbus.Conn) error {
		done := make(chan string, 1)
		_, err := c.StartTransientUnitContext(ctx, s.unit(), "replace", s.properties(pid), done)
		if repeated && isError(err, unitExists) {
			return awaitActive(ctx, c, s.unit())
		}

		repeated = true
		if err != nil {
			return err
		}

		return awaitJob(ctx, c, done)
	}); err != nil {
		return wrap(err, "start unit %s", s.unit())
	}

	if err := s.group.add(ctx, pid); err != nil {
		return err
	}

	return s.group.update(ctx, s.limits)
}

// properties returns the properties of the scope (systemd.scope(5), systemd.resource-control(5)).
func (s scope) properties(pid int) []dbus.Property {
	slice := path.Base(path.Dir(s.path))
	if slice == "/" {
		slice = "-" + sliceSuffix
	}

	unified := cgroups.Mode() == cgroups.Unified
	limits := limitProperties(s.limits, unified)
	if !unified {
		limits = append(limits, ownHierarchies()...)
	}

	return append([]dbus.Property{
		dbus.PropDescription("pause of a pod, " + s.unit()),
		dbus.PropSlice(slice),
		dbus.PropPids(uint32(pid)),
		property("Delegate", true),
		property("DefaultDependencies", false),
		property("MemoryAccounting", true),
		property("CPUAccounting", true),
		property("TasksAccounting", true),
	}, limits...)
}

// ownHierarchies returns properties that need the hierarchies devices and blkio of cgroup v1.
// systemd moves the processes of a slice out of a hierarchy that no unit of the slice needs, and
// removes the groups there. It did so to containers that runc was just starting: runc asks for
// devices late.
func ownHierarchies() []dbus.Property {
	return []dbus.Property{
		property("DevicePolicy", "closed"),
		property("BlockIOAccounting", true),
	}
}

func property(name string, value any) dbus.Property {
	return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
}

// limitProperties returns the limits that systemd would otherwise replace at a reload of its
// configuration. The files of the group keep all others.
func limitProperties(r *specs.LinuxResources, unified bool) []dbus.Property {
	if r == nil {
		return nil
	}

	var out []dbus.Property
	if r.CPU != nil && r.CPU.Shares != nil && *r.CPU.Shares > 0 {
		if unified {
			out = append(out, property("CPUWeight", cgroup2.ConvertCPUSharesToCgroupV2Value(*r.CPU.Shares)))
		} else {
			out = append(out, property("CPUShares", *r.CPU.Shares))
		}
	}

	if r.Memory != nil && r.Memory.Limit != nil && *r.Memory.Limit > 0 {
		name := "MemoryLimit"
		if unified {
			name = "MemoryMax"
		}
		out = append(out, property(name, uint64(*r.Memory.Limit)))
	}

	if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit > 0 {
		out = append(out, property("TasksMax", uint64(*r.Pids.Limit)))
	}

	return out
}

// update changes the limits of files and unit.
func (s scope) update(ctx context.Context, r *specs.LinuxResources) error {
	if err := s.group.update(ctx, r); err != nil {
		return err
	}

	properties := limitProperties(r, cgroups.Mode() == cgroups.Unified)
	if len(properties) == 0 {
		return nil
	}

	return withSystemd(ctx, func(ctx context.Context, c *dbus.Conn) error {
		return wrap(c.SetUnitPropertiesContext(ctx, s.unit(), true, properties...), "set properties of %s", s.unit())
	})
}

// remove ends the unit and removes the group. systemd may have done both after the last process.
func (s scope) remove(ctx context.Context) error {
	err := withSystemd(ctx, func(ctx context.Context, c *dbus.Conn) error {
		done := make(chan string, 1)
		if _, err := c.StopUnitContext(ctx, s.unit(), "replace", done); err != nil {
			return ignoreUnit(err)
		}
		return errors.Join(awaitJob(ctx, c, done), ignoreUnit(c.ResetFailedUnitContext(ctx, s.unit())))
	})

	return errors.Join(wrap(err, "stop unit %s", s.unit()), s.group.remove(ctx))
}

// ignoreUnit ignores that a unit has ended.
func ignoreUnit(err error) error {
	if isError(err, noSuchUnit) {
		return nil
	}
	return err
}

// isError reports whether systemd answered with an error of this name.
func isError(err error, name string) bool {
	var e godbus.Error
	return errors.As(err, &e) && e.Name == name
}

// withSystemd calls f with a connection to systemd. It calls f again if the connection ends, as at
// `systemctl daemon-reexec`: systemd may have executed a call that got no answer.
func withSystemd(ctx context.Context, f func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, systemdTimeout)
	defer cancel()

	for {
		err := connected(ctx, f)
		if !isLost(err) {
			return err
		}

		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(systemdInterval):
		}
	}
}

// connected calls f with a connection to systemd.
func connected(ctx context.Context, f func(context.Context, *dbus.Conn) error) error {
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return wrap(err, "connect to systemd")
	}
	defer c.Close()

	return f(ctx, c)
}

// isLost reports whether an error is the end of a connection, or its refusal.
func isLost(err error) bool {
	var network *net.OpError
	return errors.Is(err, godbus.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &network)
}

// awaitJob waits for the end of a job of systemd. Its signal does not arrive after the end of the
// connection.
func awaitJob(ctx context.Context, c *dbus.Conn, done <-chan string) error {
	tick := time.NewTicker(systemdInterval)
	defer tick.Stop()

	for {
		select {
		case result := <-done:
			if result != "done" {
				return fmt.Errorf("systemd's job ended with %q", result)
			}
			return nil
		case <-tick.C:
			if !c.Connected() {
				return godbus.ErrClosed
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitActive waits until a unit has started.
func awaitActive(ctx context.Context, c *dbus.Conn, unit string) error {
	for {
		state, err := c.GetUnitPropertyContext(ctx, unit, "ActiveState")
		if err != nil {
			return err
		}

		if state.Value.Value() == "active" {
			return nil
		}

		select {
		case <-time.After(systemdInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
