package podnet

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

const (
	maxDump            = 1 << 20 // bytes read of an address dump
	dumpBuffer         = 8 << 10 // the minimum buffer of the kernel (NLMSG_GOODSIZE)
	dumpTimeoutSeconds = 2       // the kernel answers at once
)

// Addresses returns the addresses of a pod's interface in the network namespace of its pause
// process, IPv4 first and at most maxIPs. It returns nil if there are none or the process is not
// the sandbox's. A process with CAP_NET_ADMIN may have created any number of devices and addresses
// in the pod, so Addresses queries only the pod's own interface and stops early.
func Addresses(id model.ContainerID, pid int) []netip.Addr {
	ns, err := OpenProcess(id, pid)
	if err != nil {
		return nil
	}
	defer ns.Close()
	return addressesIn(ns)
}

// addresses returns those of the pod's interface in the pinned namespace of a sandbox.
func (p *Pins) addresses(id model.ContainerID) []netip.Addr {
	ns, err := p.OpenPin(id)
	if err != nil {
		return nil
	}
	defer ns.Close()
	return addressesIn(ns)
}

func addressesIn(netns *os.File) []netip.Addr {
	var all []netip.Addr
	err := inNetNSFile(netns, func() (err error) {
		all, err = deviceAddresses(ifName)
		return err
	})
	if err != nil {
		return nil
	}

	return all
}

// deviceAddresses returns the addresses of a device in the thread's network namespace, IPv4 first.
// Link-local addresses are omitted.
func deviceAddresses(device string) ([]netip.Addr, error) {
	index, err := deviceIndex(device)
	if err != nil {
		return nil, err
	}

	var all []netip.Addr
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		some, err := dumpAddresses(family, index, maxIPs-len(all))
		if err != nil {
			return nil, fmt.Errorf("addresses of %s: %w", device, err)
		}
		all = append(all, some...)
	}

	return all, nil
}

// deviceIndex returns the index of a device (netdevice(7), SIOCGIFINDEX).
func deviceIndex(device string) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)

	req, err := unix.NewIfreq(device)
	if err != nil {
		return 0, err
	}

	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, fmt.Errorf("device %s: %w", device, err)
	}

	return req.Uint32(), nil
}

// dumpAddresses reads at most limit addresses of one family and device (rtnetlink(7), RTM_GETADDR).
func dumpAddresses(family uint8, index uint32, limit int) ([]netip.Addr, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)

	// With the strict check the kernel returns only addresses of this device. Before Linux 4.20 it
	// returns all.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	timeout := unix.Timeval{Sec: dumpTimeoutSeconds}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}

	request := struct {
		unix.NlMsghdr
		unix.IfAddrmsg
	}{
		unix.NlMsghdr{Type: unix.RTM_GETADDR, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP, Seq: 1},
		unix.IfAddrmsg{Family: family, Index: index},
	}

	request.Len = uint32(unsafe.Sizeof(request))
	//nolint:gosec // the kernel's structure
	b := unsafe.Slice((*byte)(unsafe.Pointer(&request)), unsafe.Sizeof(request))
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}

	var all []netip.Addr
	buffer := make([]byte, dumpBuffer)
	for read := 0; read < maxDump && len(all) < limit; {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if err != nil {
			return nil, err
		}

		read += n
		some, done, err := parseAddresses(buffer[:n], index, limit-len(all))
		if err != nil {
			return nil, err
		}

		all = append(all, some...)
		if done {
			break
		}
	}

	return all, nil
}

// parseAddresses parses a part of a dump, up to limit addresses; done reports the end of the dump.
func parseAddresses(b []byte, index uint32, limit int) (all []netip.Addr, done bool, err error) {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return nil, false, err
	}

	for _, m := range messages {
		if len(all) == limit {
			break
		}

		switch m.Header.Type {
		case unix.NLMSG_DONE:
			return all, true, nil
		case unix.NLMSG_ERROR:
			return nil, false, unix.EIO
		case unix.RTM_NEWADDR:
			if len(m.Data) < unix.SizeofIfAddrmsg {
				continue
			}
			header := (*unix.IfAddrmsg)(unsafe.Pointer(&m.Data[0])) //nolint:gosec // the length is checked
			if header.Index != index {
				continue
			}
			if a, ok := parseAddress(&m); ok && !slices.Contains(all, a) {
				all = append(all, a)
			}
		}
	}

	return all, false, nil
}

// parseAddress returns the local address of a message, or false for a link-local address.
func parseAddress(m *syscall.NetlinkMessage) (netip.Addr, bool) {
	attributes, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return netip.Addr{}, false
	}

	var local netip.Addr
	for _, a := range attributes {
		// On point-to-point links IFA_ADDRESS is the peer's address and IFA_LOCAL ours.
		if a.Attr.Type == unix.IFA_LOCAL || a.Attr.Type == unix.IFA_ADDRESS && !local.IsValid() {
			if ip, ok := netip.AddrFromSlice(a.Value); ok {
				local = ip.Unmap()
			}
		}
	}

	return local, local.IsValid() && !local.IsLinkLocalUnicast()
}
