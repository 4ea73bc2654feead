// Command tools stands in for tools of the suite's images that Debian's busybox lacks or has without what the suite needs: nmeter (only "-d0 %3t"), curl
// (only GET of the last argument) and nc (only "-w seconds -u address port"). Its name says which it is.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

func main() {
	if err := run(filepath.Base(os.Args[0]), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "nmeter":
		fmt.Println(time.Now().UTC().Format("15:04:05.000"))
		return nil
	case "curl":
		return get(args[len(args)-1])
	case "nc":
		return datagram(args)
	}
	return fmt.Errorf("%s: no such tool", name)
}

func get(url string) error {
	c := http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // as the suite asks
	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	_, err = io.Copy(os.Stdout, r.Body)
	return err
}

// datagram sends what stdin has, and prints what comes back in time.
func datagram(args []string) error {
	if len(args) != 5 || args[0] != "-w" || args[2] != "-u" {
		return fmt.Errorf("nc: unknown arguments %q", args)
	}
	seconds, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	c, err := net.Dial("udp", net.JoinHostPort(args[3], args[4]))
	if err != nil {
		return err
	}
	defer c.Close()
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if _, err := c.Write(text); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Duration(seconds) * time.Second)) // a socket has deadlines
	var b [64 << 10]byte
	if n, err := c.Read(b[:]); err == nil {
		fmt.Println(string(b[:n]))
	}
	return nil
}
